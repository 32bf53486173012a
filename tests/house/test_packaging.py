"""What is built and installed: contents of wheel and sdist, imports from elsewhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from vidaccel.catalog.models import EMBEDDED_MODEL, MODELS
from vidaccel.catalog.registry import spec_of
from vidaccel.catalog.spec import asset_path
from vidaccel.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".git", "build", "dist", "outputs", ".venv", "*.egg-info", "__pycache__", ".*_cache")


def build(source: Path, kind: str, target: Path) -> Path:
    """Build "wheel" or "sdist" of `source` without isolation or network; the path of the file."""
    target.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return target / result.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "vidaccel"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
    marker = folder / "assets" / "planted-model" / "transformer"
    marker.mkdir(parents=True)
    (marker / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(source, "wheel", tmp_path_factory.mktemp("wheel"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_pipelines_and_the_assets_and_nothing_else(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name.split("/")[0] for name in names} <= {"vidaccel", f"{wheel.name.split('-py3')[0]}.dist-info"}
    expected = {
        "vidaccel/" + path.relative_to(ROOT / "vidaccel").as_posix()
        for path in (ROOT / "vidaccel").rglob("*.py")
        if path != ROOT / "vidaccel" / "pipelines" / "__init__.py"
    }
    expected |= {"vidaccel/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "pipelines").glob("*.py")}
    assert expected <= names
    assert {"vidaccel/py.typed", "vidaccel/assets/planted-model/transformer/config.json"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests")]


@pytest.mark.slow
def test_the_wheel_carries_the_pipelines_own_init_and_not_the_bridge(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("vidaccel/pipelines/__init__.py").decode()
    assert text == (ROOT / "pipelines" / "__init__.py").read_text(encoding="utf-8")
    assert "__path__" not in text


@pytest.mark.slow
def test_a_wheel_from_the_sdist_equals_a_wheel_from_the_checkout(source: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build(source, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "tests/support/tiny_models.py"):
        assert (unpacked / name).is_file(), name
    assert names_in(build(unpacked, "wheel", tmp_path / "wheel")) == names_in(wheel)


@pytest.mark.slow
def test_an_installed_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import vidaccel, vidaccel.pipelines, vidaccel.catalog.spec as spec\n"
        f"assert vidaccel.__file__.startswith({str(tmp_path / 'site')!r}), vidaccel.__file__\n"
        "print(spec.asset_path('planted-model'))\n"
        "print(vidaccel.pipelines.__path__[0])\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    asset, pipelines = result.stdout.strip().splitlines()
    assert Path(asset) == tmp_path / "site" / "vidaccel" / "assets" / "planted-model"
    assert Path(pipelines) == tmp_path / "site" / "vidaccel" / "pipelines"


def test_the_checkout_finds_its_pipelines_and_assets_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    import vidaccel.pipelines

    assert Path(next(iter(vidaccel.pipelines.__path__))) == ROOT / "pipelines"
    assert asset_path("README.md").is_file()
    with pytest.raises(UserError, match="no asset 'nothing'"):
        asset_path("nothing")


def test_names_of_models_are_unique_and_found() -> None:
    assert len({spec.name for spec in MODELS}) == len(MODELS)
    assert all(spec_of(spec.name) is spec for spec in MODELS)
    assert spec_of("Wan-AI/Wan2.1-T2V-1.3B-Diffusers").name == "wan2.1-t2v-1.3b"


def test_a_folder_may_record_its_own_settings(tiny_wan_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_wan_folder, folder)
    assert spec_of(str(folder)).defaults.width == 832
    (folder / "vidaccel.json").write_text('{"weights": "random", "defaults": {"width": 64, "num_frames": 9}}')
    spec = spec_of(str(folder))
    assert (spec.weights, spec.defaults.width, spec.defaults.num_frames) == ("random", 64, 9)
    for wrong in ('{"defaults": {"colour": 1}}', '{"weights": "good"}', "[1]"):
        (folder / "vidaccel.json").write_text(wrong)
        with pytest.raises(UserError, match=r"vidaccel\.json"):
            spec_of(str(folder))


@pytest.mark.shipped
def test_the_embedded_model_records_the_settings_of_its_row_and_is_small() -> None:
    folder = asset_path(EMBEDDED_MODEL)
    assert spec_of(str(folder)).defaults == spec_of(EMBEDDED_MODEL).defaults
    sizes = [path.stat().st_size for path in folder.rglob("*.safetensors")]
    assert max(sizes) <= 16 * 2**20
    assert sum(sizes) <= 18 * 2**20


def test_the_constraints_satisfy_the_requirements_and_pin_every_one_of_them() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *extras["docs"], *extras["test"], *extras["metrics"]):
        requirement = Requirement(text)
        assert requirement.name.lower() in pins, f"{requirement.name} is not pinned"
        assert Version(pins[requirement.name.lower()]) in requirement.specifier, text
    assert pins["torch"] == "2.13.0"


def test_nothing_committed_names_a_machine_path() -> None:
    # Paths as they are written here would find themselves, hence the join.
    words = ["/" + word + "/" for word in ("work", "root", "home")]
    for folder in ("vidaccel", "pipelines", "demos", "docs", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".json", ".toml", "") and path.is_file():
                text = path.read_text(encoding="utf-8", errors="ignore")
                assert not [word for word in words if word in text], path
