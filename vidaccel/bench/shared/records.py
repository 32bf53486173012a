"""Results that survive an interrupt: one JSON file, written whole after every record, continued by the next run."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidaccel.easycache.config import EasyCacheConfig
from vidaccel.errors import UserError
from vidaccel.files.text import json_number, write_json


def easycache_settings(config: EasyCacheConfig) -> dict[str, Any]:
    """The settings as strict JSON holds them."""
    return {name: json_number(value) if isinstance(value, float) else value for name, value in config.to_dict().items()}


def read_results(path: Path) -> dict[str, Any]:
    """The content of a result file: `protocol`, `environments`, `records` and more.

    Raises UserError where it is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stored, environments, records = (content[name] for name in ("protocol", "environments", "records"))
        if not (isinstance(stored, dict) and isinstance(environments, list) and isinstance(records, list)):
            raise TypeError("a protocol with lists of environments and records is missing")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} holds no results of a benchmark; choose another folder.") from error
    return dict(content)


class ResultFile:
    """The records of one benchmark, their protocol and the environments they were measured in.

    Each record names its environment by index, because a continued run may be on another machine or commit.
    """

    def __init__(
        self,
        path: Path,
        *,
        protocol: Mapping[str, Any],
        environment: Mapping[str, Any],
        seconds_between_writes: float = 0.0,
    ) -> None:
        """Open `path`, or start it. Raises UserError where it holds results of another protocol or no results.

        seconds_between_writes: how much work an interrupt may cost; a large file takes longer to write than a record
            to measure. Call `write` at the end.
        """
        self.path = path
        self.protocol = json.loads(json.dumps(protocol, allow_nan=False))
        self.environments: list[dict[str, Any]] = []
        self.records: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._environment = dict(environment)
        self._seconds_between_writes = seconds_between_writes
        self._written = time.monotonic()
        if path.exists():
            self.take(path)

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The record whose fields equal `key`, or None."""
        return next((record for record in self.records if key.items() <= record.items()), None)

    def add(self, record: Mapping[str, Any]) -> None:
        """Append a record and write the file."""
        self.records.append({**record, "environment": self._index_of(self._environment)})
        if time.monotonic() - self._written >= self._seconds_between_writes:
            self.write()

    def take(self, path: Path, *, key: Sequence[str] = ()) -> None:
        """Take in the records of another file of the same protocol, but those whose `key` fields one here has already.

        Raises UserError for any other file.
        """
        environments, records = self._read(path)
        places = [self._index_of(environment) for environment in environments]
        known = {tuple(record.get(name) for name in key) for record in self.records} if key else set()
        for record in records:
            if tuple(record.get(name) for name in key) not in known:
                self.records.append({**record, "environment": places[record["environment"]]})

    @property
    def content(self) -> dict[str, Any]:
        """What the file holds, and what tables are made of."""
        return {
            "protocol": self.protocol,
            "environments": self.environments,
            "summary": self.summary,
            "records": self.records,
        }

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file with its summary; returns that."""
        self.summary = dict(summary)
        self.write()
        return self.summary

    def write(self) -> None:
        """Write the file whole or not at all."""
        write_json(self.path, self.content)
        self._written = time.monotonic()

    def _read(self, path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        content = read_results(path)
        stored = content["protocol"]
        if stored != self.protocol:
            names = sorted(name for name in {*stored, *self.protocol} if stored.get(name) != self.protocol.get(name))
            raise UserError(
                f"{path} was measured with another protocol ({', '.join(names)}); choose another output folder."
            )
        return content["environments"], content["records"]

    def _index_of(self, environment: dict[str, Any]) -> int:
        def settled(one: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in one.items() if name not in ("date", "command")}

        for index, known in enumerate(self.environments):
            if settled(known) == settled(environment):
                return index
        self.environments.append(environment)
        return len(self.environments) - 1
