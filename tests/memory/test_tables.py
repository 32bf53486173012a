"""The worked tables of slow-fast memory, chunk by chunk: the released code's bookkeeping and the recommended one.

A number is a frame with the keys and values of its clean pass; with `a` to `d` behind it they are from the first to the
fourth denoising pass. A row is the state after the clean pass of the chunk that begins at its first number.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vidaccel.memory import Entry, MemoryConfig, MemoryIndex

# First frame of a chunk: the similarity of its triggering pass (0 to 3 denoising, 4 the clean one); all others are .99.
SCRIPT = {
    **dict.fromkeys((24, 33, 36, 42, 45, 51, 54, 60, 63), (0, 0.8)),
    9: (0, 0.90),
    15: (0, 0.93),
    21: (0, 0.94),
    27: (3, 0.91),
    30: (0, 0.95),
    48: (4, 0.90),
}
SCRIPT_D = dict.fromkeys((4, 8, 10, 14, 16, 20), (0, 0.8))

# first frame | sink | slow area | fast | frames copied to slow memory (| positions)
TABLE_A = """
0 | 0 1 2 | | | 0
3 | 0 1 2 | 3 4 5 | | 0
6 | 0 1 2 | 3 4 5 6 7 8 | | 0
9 | 0 1 2 | 9a 4 5 6 7 8 9 10 11 | | 1
12 | 0 1 2 | 9a 4 5 6 7 8 9 10 11 12 13 14 | | 1
15 | 0 1 2 | 9a 15a 5 6 7 8 9 10 11 12 13 14 | 15 16 17 | 2
18 | 0 1 2 | 9a 15a 5 6 7 8 9 10 11 12 13 14 | 15 16 17 18 19 20 | 2
21 | 0 1 2 | 9a 15a 21a 6 7 8 9 10 11 12 13 14 | 18 19 20 21 22 23 | 3
24 | 0 1 2 | 9a 15a 21a 24a 7 8 9 10 11 12 13 14 | 21 22 23 24 25 26 | 4
27 | 0 1 2 | 9a 15a 21a 24a 27d 8 9 10 11 12 13 14 | 24 25 26 27 28 29 | 5
30 | 0 1 2 | 9a 15a 21a 24a 27d 8 9 10 11 12 13 14 | 27 28 29 30 31 32 | 5
33 | 0 1 2 | 9a 15a 21a 24a 27d 33a 9 10 11 12 13 14 | 30 31 32 33 34 35 | 6
36 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 10 11 12 13 14 | 33 34 35 36 37 38 | 7
39 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 10 11 12 13 14 | 36 37 38 39 40 41 | 7
42 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 11 12 13 14 | 39 40 41 42 43 44 | 8
45 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 45a 12 13 14 | 42 43 44 45 46 47 | 9
48 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 45a 48 13 14 | 45 46 47 48 49 50 | 10
51 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 45a 48 51a 14 | 48 49 50 51 52 53 | 11
54 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 45a 48 51a 54a | 51 52 53 54 55 56 | 12
57 | 0 1 2 | 9a 15a 21a 24a 27d 33a 36a 42a 45a 48 51a 54a | 54 55 56 57 58 59 | 12
60 | 0 1 2 | 15a 21a 24a 27d 33a 36a 42a 45a 48 51a 54a 60a | 57 58 59 60 61 62 | 12
63 | 0 1 2 | 21a 24a 27d 33a 36a 42a 45a 48 51a 54a 60a 63a | 60 61 62 63 64 65 | 12
"""
TABLE_B = """
0 | 0 1 2 | | | 0
3 | 0 1 2 | 3 4 5 | | 0
6 | 0 1 2 | 6a 4 5 6 7 8 | | 1
9 | 0 1 2 | 6a 4 5 6 7 8 9 10 11 | | 1
12 | 0 1 2 | 6a 12a 5 6 7 8 9 10 11 12 13 14 | | 2
15 | 0 1 2 | 6a 12a 5 6 7 8 9 10 11 12 13 14 | 15 16 17 | 2
18 | 0 1 2 | 6a 12a 18a 6 7 8 9 10 11 12 13 14 | 15 16 17 18 19 20 | 3
21 | 0 1 2 | 6a 12a 18a 6 7 8 9 10 11 12 13 14 | 18 19 20 21 22 23 | 3
24 | 0 1 2 | 6a 12a 18a 24a 7 8 9 10 11 12 13 14 | 21 22 23 24 25 26 | 4
30 | 0 1 2 | 6a 12a 18a 24a 30a 8 9 10 11 12 13 14 | 27 28 29 30 31 32 | 5
36 | 0 1 2 | 6a 12a 18a 24a 30a 36a 9 10 11 12 13 14 | 33 34 35 36 37 38 | 6
42 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 10 11 12 13 14 | 39 40 41 42 43 44 | 7
48 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 48a 11 12 13 14 | 45 46 47 48 49 50 | 8
54 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 48a 54a 12 13 14 | 51 52 53 54 55 56 | 9
60 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 48a 54a 60a 13 14 | 57 58 59 60 61 62 | 10
66 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 48a 54a 60a 66a 14 | 63 64 65 66 67 68 | 11
72 | 0 1 2 | 6a 12a 18a 24a 30a 36a 42a 48a 54a 60a 66a 72a | 69 70 71 72 73 74 | 12
78 | 0 1 2 | 12a 18a 24a 30a 36a 42a 48a 54a 60a 66a 72a 78a | 75 76 77 78 79 80 | 12
81 | 0 1 2 | 12a 18a 24a 30a 36a 42a 48a 54a 60a 66a 72a 78a | 78 79 80 81 82 83 | 12
84 | 0 1 2 | 18a 24a 30a 36a 42a 48a 54a 60a 66a 72a 78a 84a | 81 82 83 84 85 86 | 12
90 | 0 1 2 | 24a 30a 36a 42a 48a 54a 60a 66a 72a 78a 84a 90a | 87 88 89 90 91 92 | 12
96 | 0 1 2 | 30a 36a 42a 48a 54a 60a 66a 72a 78a 84a 90a 96a | 93 94 95 96 97 98 | 12
"""
TABLE_D = """
0 | 0 | 1 | | 0 | 0 1
2 | 0 | 1 2 3 | | 0 | 0 1 2 3
4 | 0 | 4a 2 3 4 | 5 | 1 | 0 1 2 3 4 5
6 | 0 | 4a 2 3 4 | 5 6 7 | 1 | 0 1 2 3 4 5 6 7
8 | 0 | 4a 8a 3 4 | 7 8 9 | 2 | 0 2 3 4 5 6 7 8
10 | 0 | 4a 8a 10a 4 | 9 10 11 | 3 | 0 2 3 4 5 6 7 8
12 | 0 | 4a 8a 10a 4 | 11 12 13 | 3 | 0 2 3 4 5 6 7 8
14 | 0 | 4a 8a 10a 14a | 13 14 15 | 4 | 0 2 3 4 5 6 7 8
16 | 0 | 8a 10a 14a 16a | 15 16 17 | 4 | 0 2 3 4 5 6 7 8
18 | 0 | 8a 10a 14a 16a | 17 18 19 | 4 | 0 2 3 4 5 6 7 8
20 | 0 | 10a 14a 16a 20a | 19 20 21 | 4 | 0 2 3 4 5 6 7 8
"""


def rows(table: str) -> dict[int, list[str]]:
    cells = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return {int(first): others for first, *others in cells}


def written(index: MemoryIndex, part: str) -> str:
    return " ".join(symbol(entry) for entry in index.entries if entry.part == part)


def symbol(entry: Entry) -> str:
    assert entry.source is not None
    return f"{entry.frame}{'' if entry.source == 'clean' else 'abcd'[entry.source]}"


def similarities(script: dict[int, tuple[int, float]], frame: int) -> list[float]:
    place, value = script.get(frame, (0, 0.99))
    return [value if number == place else 0.99 for number in range(5)]


def after_each_chunk(
    index: MemoryIndex, last_frame: int, values: Callable[[int], list[float] | None]
) -> dict[int, list[str]]:
    """Sink, slow and fast memory after each chunk, as the tables write them."""
    states = {}
    while index.num_frames <= last_frame:
        first = index.num_frames
        index.begin_chunk()
        index.commit(values(first))
        num_copied = sum(entry.is_copy for entry in index.entries)
        states[first] = [written(index, part) for part in ("sink", "slow", "fast")] + [str(num_copied)]
    return states


def test_table_a_official_with_similarities_is_reproduced() -> None:
    index = MemoryIndex(MemoryConfig(mode="official"))
    assert after_each_chunk(index, 63, lambda frame: similarities(SCRIPT, frame)) == rows(TABLE_A)


def test_table_b_official_with_an_interval_of_six_is_reproduced() -> None:
    index = MemoryIndex(MemoryConfig(mode="official", keyframe_rule="uniform"))
    states = after_each_chunk(index, 96, lambda frame: [0.99] * 5)
    listed = rows(TABLE_B)
    assert {first: states[first] for first in listed} == listed
    for first in sorted(set(states) - set(listed)):
        assert states[first][:2] == states[first - 3][:2], "a chunk that is not listed changes nothing but fast memory"
        assert states[first][2] == " ".join(str(frame) for frame in range(first - 3, first + 3))


def test_in_the_steady_state_of_table_b_slow_memory_goes_back_66_to_69_frames() -> None:
    index = MemoryIndex(MemoryConfig(mode="official", keyframe_rule="uniform"))
    states = after_each_chunk(index, 300, lambda frame: None)
    reaches = {first - int(state[1].split()[0].rstrip("a")) for first, state in states.items() if first >= 78}
    assert reaches == {66, 69}


def test_table_d_official_with_sizes_that_are_not_divisible_is_reproduced() -> None:
    config = MemoryConfig(sink_frames=1, slow_frames=4, fast_frames=4, chunk_frames=2, mode="official")
    index = MemoryIndex(config)
    for first, expected in rows(TABLE_D).items():
        index.begin_chunk()
        for similarity in similarities(SCRIPT_D, first)[:4]:
            index.observe(similarity)
        attended = " ".join(map(str, index.positions))
        index.commit(0.99)
        num_copied = sum(entry.is_copy for entry in index.entries)
        assert [written(index, part) for part in ("sink", "slow", "fast")] == expected[:3]
        assert [str(num_copied), " ".join(map(str, index.positions))] == expected[3:]
        assert attended == expected[4]


@pytest.mark.parametrize("rule", ["similarity", "uniform"])
def test_official_positions_are_the_slots_where_sizes_are_divisible(rule: str) -> None:
    index = MemoryIndex(MemoryConfig(mode="official", keyframe_rule=rule))
    for first in range(0, 120, 3):
        index.begin_chunk()
        for similarity in similarities(SCRIPT, first):
            index.observe(similarity)
            attended = min(first + 3, 21)
            assert index.positions == tuple(range(attended))
            assert [entry.frame for entry in index.entries[-3:]] == [first, first + 1, first + 2]
        index.commit(0.99)


def test_an_official_pass_attends_to_the_copy_that_it_made() -> None:
    index = MemoryIndex(MemoryConfig(mode="official"))
    for _ in range(7):
        index.begin_chunk()
        index.commit(0.99)
    index.begin_chunk()
    assert Entry(21, "current", source=None) in index.entries
    index.observe(0.99)
    assert not any(entry.is_copy for entry in index.entries)
    assert Entry(21, "current", source=0) in index.entries
    index.observe(0.90)
    assert index.entries[3] == Entry(21, "slow", is_copy=True, source=1)
    assert [entry.frame for entry in index.entries].count(21) == 2
    index.observe(0.10)
    index.commit(0.10)
    assert index.entries[3] == Entry(21, "slow", is_copy=True, source=1), "a copy is never refreshed"
    assert index.is_keyframe


# first frame | K for a keyframe | slow | fast; the sink is 0 1 2 throughout
TABLE_C_SIMILARITY = """
6 | | | 3 4 5 6 7 8
9 | K | | 6 7 8 9 10 11
12 | | | 9 10 11 12 13 14
15 | K | 9 | 12 13 14 15 16 17
18 | | 9 | 15 16 17 18 19 20
21 | K | 9 15 | 18 19 20 21 22 23
24 | K | 9 15 | 21 22 23 24 25 26
27 | K | 9 15 21 | 24 25 26 27 28 29
30 | | 9 15 21 24 | 27 28 29 30 31 32
33 | K | 9 15 21 24 27 | 30 31 32 33 34 35
36 | K | 9 15 21 24 27 | 33 34 35 36 37 38
39 | | 9 15 21 24 27 33 | 36 37 38 39 40 41
42 | K | 9 15 21 24 27 33 36 | 39 40 41 42 43 44
45 | K | 9 15 21 24 27 33 36 | 42 43 44 45 46 47
48 | K | 9 15 21 24 27 33 36 42 | 45 46 47 48 49 50
51 | K | 9 15 21 24 27 33 36 42 45 | 48 49 50 51 52 53
54 | K | 9 15 21 24 27 33 36 42 45 48 | 51 52 53 54 55 56
57 | | 9 15 21 24 27 33 36 42 45 48 51 | 54 55 56 57 58 59
60 | K | 9 15 21 24 27 33 36 42 45 48 51 54 | 57 58 59 60 61 62
63 | K | 9 15 21 24 27 33 36 42 45 48 51 54 | 60 61 62 63 64 65
"""
TABLE_C_UNIFORM = """
6 | K | | 3 4 5 6 7 8
9 | | | 6 7 8 9 10 11
12 | K | 6 | 9 10 11 12 13 14
15 | | 6 | 12 13 14 15 16 17
18 | K | 6 12 | 15 16 17 18 19 20
21 | | 6 12 | 18 19 20 21 22 23
24 | K | 6 12 18 | 21 22 23 24 25 26
27 | | 6 12 18 | 24 25 26 27 28 29
30 | K | 6 12 18 24 | 27 28 29 30 31 32
33 | | 6 12 18 24 | 30 31 32 33 34 35
36 | K | 6 12 18 24 30 | 33 34 35 36 37 38
39 | | 6 12 18 24 30 | 36 37 38 39 40 41
42 | K | 6 12 18 24 30 36 | 39 40 41 42 43 44
45 | | 6 12 18 24 30 36 | 42 43 44 45 46 47
48 | K | 6 12 18 24 30 36 42 | 45 46 47 48 49 50
51 | | 6 12 18 24 30 36 42 | 48 49 50 51 52 53
54 | K | 6 12 18 24 30 36 42 48 | 51 52 53 54 55 56
57 | | 6 12 18 24 30 36 42 48 | 54 55 56 57 58 59
60 | K | 6 12 18 24 30 36 42 48 54 | 57 58 59 60 61 62
63 | | 6 12 18 24 30 36 42 48 54 | 60 61 62 63 64 65
66 | K | 6 12 18 24 30 36 42 48 54 60 | 63 64 65 66 67 68
69 | | 6 12 18 24 30 36 42 48 54 60 | 66 67 68 69 70 71
72 | K | 6 12 18 24 30 36 42 48 54 60 66 | 69 70 71 72 73 74
75 | | 6 12 18 24 30 36 42 48 54 60 66 | 72 73 74 75 76 77
78 | K | 6 12 18 24 30 36 42 48 54 60 66 72 | 75 76 77 78 79 80
81 | | 6 12 18 24 30 36 42 48 54 60 66 72 | 78 79 80 81 82 83
84 | K | 12 18 24 30 36 42 48 54 60 66 72 78 | 81 82 83 84 85 86
"""


@pytest.mark.parametrize(("rule", "table"), [("similarity", TABLE_C_SIMILARITY), ("uniform", TABLE_C_UNIFORM)])
def test_table_c_clean_is_reproduced(rule: str, table: str) -> None:
    index = MemoryIndex(MemoryConfig(keyframe_rule=rule))
    for _ in range(2):
        index.begin_chunk()
        index.commit(0.99)
    for first, (keyframe, slow, fast) in rows(table).items():
        index.begin_chunk()
        assert index.current == (first, first + 1, first + 2)
        index.commit(min(similarities(SCRIPT, first)))
        assert [written(index, part) for part in ("sink", "slow", "fast")] == ["0 1 2", slow, fast]
        assert index.is_keyframe == (keyframe == "K")
        assert not any(entry.is_copy for entry in index.entries)
