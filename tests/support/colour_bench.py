"""A benchmark in one file, on the parts that all benchmarks share: how often an unseen prompt names a colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vidaccel.bench.shared.benchmark import Benchmark, BenchProgress, Tell, option
from vidaccel.bench.shared.markdown import markdown_table
from vidaccel.errors import UserError
from vidaccel.world import unseen_prompts


@dataclass(frozen=True, kw_only=True)
class ColourBench(Benchmark):
    """One record a colour."""

    name = "colours"

    colours: tuple[str, ...] = option("Which colours.", ("red", "blue"))
    num_prompts: int = option("How many unseen prompts.", 8)
    as_share: bool = option("Shares of the prompts.", False, recorded=False)

    def __post_init__(self) -> None:
        if self.num_prompts < 1:
            raise UserError(f"`num_prompts` must be at least 1, got {self.num_prompts}.")

    def run(self, *, on_progress: Tell = None) -> dict[str, Any]:
        texts = [prompt.text for prompt in unseen_prompts(self.num_prompts)]
        results = self.results(self.protocol({"texts": texts}), environment={"hardware": "none"})
        for done, colour in enumerate(self.colours):
            if results.find(colour=colour) is not None:
                continue
            if on_progress is not None:
                on_progress(BenchProgress(done=done, total=len(self.colours), label=colour))
            results.add({"colour": colour, "count": sum(colour in text for text in texts)})
        scale = len(texts) if self.as_share else 1
        summary = results.finish({record["colour"]: record["count"] / scale for record in results.records})
        self.write_table("\n".join(markdown_table(["colour", "count"], [[k, str(v)] for k, v in summary.items()])))
        return summary
