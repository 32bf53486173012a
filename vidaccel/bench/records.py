"""Results that survive an interrupt: one JSON file, written whole after every record, continued by the next run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidaccel.easycache import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.metrics import json_number
from vidaccel.video import whole_file


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def easycache_settings(config: EasyCacheConfig) -> dict[str, Any]:
    """The settings as strict JSON holds them."""
    return {name: json_number(value) if isinstance(value, float) else value for name, value in config.to_dict().items()}


class ResultFile:
    """The records of one benchmark, their protocol and the environments they were measured in.

    Each record names its environment by index, because a continued run may be on another machine or commit.
    """

    def __init__(self, path: Path, *, protocol: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Open `path`, or start it. Raises UserError where it holds results of another protocol or no results."""
        self.path = path
        self.protocol = json.loads(json.dumps(protocol, allow_nan=False))
        self.environments: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        if path.exists():
            self._read()
        self.environment = self._index_of(dict(environment))

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The record whose fields equal `key`, or None."""
        return next((record for record in self.records if key.items() <= record.items()), None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and write the file."""
        self.records.append({**record, "environment": self.environment})
        self.write()

    def write(self) -> None:
        """Write the file whole or not at all."""
        content = {
            "protocol": self.protocol,
            "environments": self.environments,
            "summary": self.summary,
            "records": self.records,
        }
        write_json(self.path, content)

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            stored, self.environments, self.records = (
                content[name] for name in ("protocol", "environments", "records")
            )
            if not (
                isinstance(stored, dict) and isinstance(self.environments, list) and isinstance(self.records, list)
            ):
                raise TypeError("a protocol with lists of environments and records is missing")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} holds no results of a benchmark; choose another output folder.") from error
        if stored != self.protocol:
            names = sorted(name for name in {*stored, *self.protocol} if stored.get(name) != self.protocol.get(name))
            raise UserError(
                f"{self.path} was measured with another protocol ({', '.join(names)}); choose another output folder."
            )

    def _index_of(self, environment: dict[str, Any]) -> int:
        def settled(one: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in ("date", "command")}

        for index, known in enumerate(self.environments):
            if settled(known) == settled(environment):
                return index
        self.environments.append(environment)
        return len(self.environments) - 1
