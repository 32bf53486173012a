"""The benchmarks by name: the class of each as `module:Name`, and its line of help. A new one is a file and a row."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from vidaccel.catalog.pipelines import named_class

if TYPE_CHECKING:  # it loads PyTorch, which the list of the commands does without
    from vidaccel.bench.shared.benchmark import Benchmark

BENCHMARKS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "easycache": (
            "vidaccel.bench.caching.easycache:EasyCacheBench",
            "EasyCache at several thresholds against fewer steps and uniform reuse: easycache.json, .md, .png.",
        ),
        "caches": (
            "vidaccel.bench.caching.caches:CachesBench",
            "EasyCache against the caches of diffusers at equal executed work: caches.json, .md, .png.",
        ),
        "quality": (
            "vidaccel.bench.quality:QualityBench",
            "What a model of the storybook world can do, read by the oracle: quality.json, quality.md.",
        ),
        "speed": (
            "vidaccel.bench.speed:SpeedBench",
            "Time of a full-size transformer with random weights, with and without reuse: speed.json, speed.md.",
        ),
        "rollout": (
            "vidaccel.bench.rollout.rollout:RolloutBench",
            "Frames per second and memory of a full-size causal student with random weights: rollout.json, .md, .png.",
        ),
        "commands": (
            "vidaccel.bench.commands:CommandsBench",
            "`vidaccel generate` and `rollout` as commands at full size, random weights: commands.json, commands.md.",
        ),
        "recall": (
            "vidaccel.bench.recall.recall:RecallBench",
            "Is a place the same when the camera of a causal student comes back, and is it the memory: recall.json, "
            ".md, .png, .places.png.",
        ),
        "endless": (
            "vidaccel.bench.endless.endless:EndlessBench",
            "Minutes of a causal student's video: what the process takes, and whether a place of the first seconds "
            "comes back: endless.json, .md, .png.",
        ),
        "skipping": (
            "vidaccel.bench.skipping.skipping:SkippingBench",
            "Which steps of a chunk a few-step student can do without, and what it costs: skipping.json, .md, .png.",
        ),
        "teachers": (
            "vidaccel.bench.teachers.teachers:TeachersBench",
            "Does a student remember if its teacher does, long against short teachers: teachers.json, .md, .png.",
        ),
        "offline": (
            "vidaccel.bench.offline.offline:OfflineBench",
            "Distillation onto targets that a teacher wrote down once, against anew and against none: offline.json, "
            ".md.",
        ),
        "training": (
            "vidaccel.bench.training.training:TrainingBench",
            "Memory and seconds of training a full-size causal student with random weights: training.json, .md.",
        ),
        "depth": (
            "vidaccel.bench.depth.depth:DepthBench",
            "Layers that share a memory against fewer frames and 4 bits, of students with routing and without: "
            "depth.json, .md, .png.",
        ),
        "student": (
            "vidaccel.bench.student.student:StudentBench",
            "Does a causal student do what its prompt says, and is it sharp, read by the oracles: student.json, .md, "
            ".png.",
        ),
    }
)


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of the benchmark of that name."""
    kind: type[Benchmark] = named_class(BENCHMARKS[name][0])
    return kind
