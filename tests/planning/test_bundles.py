"""Bundles counted in schedules that were written by hand, in the form of libtpu's dumps."""

import pytest

from tvq_pod.planning.bundles import Count, count_bundles

SLOTS = "  {}\n" * 4  # what is run after a branch, whether it is taken or not


def schedule(text: str) -> str:
    """A dump of these bundles, one a line: "LB {...}" has a label, "-> 3 {...}" begins region 3."""
    lines = ["= control target key start", "LH: loop header", "= control target key end", ""]
    for place, line in enumerate(text.strip().splitlines()):
        label, bundle = line.strip().split("{", 1)
        label, _, region = label.partition("->")
        comment = f" /* Start region {region.strip()} */" if region else ""
        depth = ">" * label.count(">")
        label = label.strip("> ")
        lines.append(f"{hex(place) if place else '0':>6} {label.strip():<2} : {depth} {{{bundle}{comment}")
    return "\n".join(lines) + " /* exit bundle: %f = fusion(%x) */\n"


def test_bundles_in_a_row_are_run_once():
    assert count_bundles(schedule("{ %v1_v0 = vlaneseq }\n{}\n{ %3 = vst [vmem:[%s1_s0]] %v1_v0 }")) == Count(
        3, 3, True
    )


LOOP = f"""
{{ %s10_s1 = smov 0 /* materialized constant */ }}
LB -> 7 {{ %s11_s1 = sphi %s10_s1, %s12_s1 /* phi copy */ ;; %v1_v0 = vadd.f32 %v0_v0, %v0_v0 }}
{{ %s12_s1 = sadd.s32 1, %s11_s1 }}
{{ %p13_p0 = scmp.ge.s32.totalorder %s12_s1, 5 /* loop exit test */ }}
{{ %14 = sbr.rel (!%p13_p0) target = $region7 }}
{SLOTS}
{{}}
"""


def test_a_loop_counts_as_often_as_it_turns():
    assert count_bundles(schedule(LOOP.replace("\n\n", "\n"))) == Count(1 + 5 * (4 + 4) + 1, 10, True)


def test_a_loop_in_a_loop_counts_its_turns_each_time():
    inner = """
>> { %s40_s4 = smov 0 }
LB >> -> 17 { %s41_s4 = sphi %s40_s4, %s42_s4 }
>> { %s42_s4 = sadd.s32 2, %s41_s4 ;; %p43_p5 = scmp.ge.s32.totalorder %s41_s4, 8 }
>> { %44 = sbr.rel (!%p43_p5) target = $region17 }
>> {}
>> {}
>> {}
>> {}
"""
    nested = LOOP.replace("{ %s12_s1 = sadd", f"{inner}{{ %s12_s1 = sadd")
    text = "\n".join(line for line in nested.splitlines() if line)
    assert count_bundles(schedule(text)) == Count(1 + 5 * (8 + 1 + 5 * 7) + 1, 18, True)


def grid(steps: int, turns: int, guard: str = "", store: str = "", read: str = "%p21_p1") -> str:
    """A grid of `steps`, as a loop of `turns`: the body of 10 bundles is skipped where there is nothing to work on; in
    it 6 more are for every second step."""
    every_second = f"""
{{ %s30_s3 = sand.u32 1, %s11_s1 ;; {guard} }}
{{ %p31_p2 = scmp.eq.s32.totalorder %s30_s3, 0 }}
{{ %32 = sbr.rel (%p31_p2) target = $region9 }}
{SLOTS}"""
    return f"""
{{ %s10_s1 = smov 0 }}
LB -> 7 {{ %s11_s1 = sphi %s10_s1, %s12_s1 }}
{{ %p20_p3 = scmp.ge.s32.totalorder %s11_s1, 1 ;; {store} }}
{{ %p22_p4 = scmp.lt.s32.totalorder %s11_s1, {steps + 1} }}
{{ %p21_p1 = pnand %p20_p3, %p22_p4 }}
{{ {read.partition(";")[2]} }}
{{ %23 = sbr.rel ({read.partition(";")[0]}) target = $region8 }}
{SLOTS}{every_second}{"{}" + chr(10)}{"{}" + chr(10)}
PF -> 9 {{ %s50_s9 = smov 3 }}
PF -> 8 {{ %s12_s1 = sadd.s32 1, %s11_s1 }}
{{ %p13_p0 = scmp.ge.s32.totalorder %s12_s1, {turns} /* loop exit test */ }}
{{ %14 = sbr.rel (!%p13_p0) target = $region7 }}
{SLOTS}"""


def text_of(lines: str) -> str:
    return schedule("\n".join(line for line in lines.splitlines() if line.strip()))


def test_turns_that_only_move_data_and_branches_of_some_steps_count_with_what_they_run():
    """Each turn 17 bundles; each step 8 more; each odd one 2 more."""
    every, step, odd = 6 + 4 + 3 + 4, 3 + 4 + 1, 2
    assert count_bundles(text_of(grid(6, 8))) == Count(1 + 8 * every + 6 * step + 3 * odd, 1 + every + step + odd, True)


def test_conditions_may_be_kept_in_memory_and_be_chosen():
    """A predicate becomes a number, is spilled, read again, and compared."""
    kept = "%s60_s5 = scalar_select /*predicate=*/%p21_p1, /*on_true=*/1, /*on_false=*/0 ;; "
    kept += "%61 = sst [smem:[#allocation9_spill]] %s60_s5 ;; %s62_s6 = sld [smem:[#allocation9_spill]] ;; "
    kept += "%s63_s6 = smov (!%p21_p1, %s62_s6), 7 ;; %p64_p7 = scmp.ne.s32.totalorder %s63_s6, 7"
    by_memory = text_of(grid(6, 8, read=f"%p64_p7;{kept}"))
    assert count_bundles(by_memory) == count_bundles(text_of(grid(6, 8)))


def test_what_data_decides_counts_as_run():
    data = grid(6, 8).replace("%s30_s3 = sand.u32 1, %s11_s1", "%s30_s3 = sld [smem:[%s4_s4]]")
    every, step, both = 17, 8, 2
    assert count_bundles(text_of(data)) == Count(1 + 8 * every + 6 * (step + both), 28, True)


def test_a_loop_whose_turns_depend_on_data_is_not_exact():
    data = LOOP.replace("%s12_s1, 5 /*", "%s12_s1, %s99_s9 /*").replace(
        "{ %s10_s1", "{ %s99_s9 = sld [smem:[%s4_s4]] ;; %s10_s1"
    )
    count = count_bundles(schedule(data.replace("\n\n", "\n")))
    assert (count.cycles, count.is_exact) == (10, False)


def test_numbers_are_words_of_32_bits_with_a_sign():
    """A loop from -3 up to 2: 4294967293 is less than 2."""
    negative = LOOP.replace("smov 0", "smov 4294967293").replace("%s12_s1, 5 /*", "%s12_s1, 2 /*")
    assert count_bundles(schedule(negative.replace("\n\n", "\n"))).cycles == 1 + 5 * 8 + 1


def test_an_instruction_that_is_guarded_changes_nothing_if_it_is_not_run():
    guarded = LOOP.replace(
        "{ %p13_p0", "{ %p50_p5 = scmp.ge.s32.totalorder %s12_s1, 3 }\n{ %s12_s1 = smov (%p50_p5), 9 }\n{ %p13_p0"
    )
    assert count_bundles(schedule(guarded.replace("\n\n", "\n"))).cycles == 1 + 3 * 10 + 1


def test_a_region_that_is_not_listed_begins_at_the_next_place_without_a_name():
    """libtpu names no region that would begin at the end of the program."""
    lines = (
        "{ %p1_p0 = scmp.eq.s32.totalorder 1, 1 }\n{ %2 = sbr.rel (%p1_p0) target = $region4 }\n"
        + SLOTS
        + "{}\n{}\nPF {}"
    )
    assert count_bundles(schedule(lines)) == Count(7, 9, True)


def test_what_is_no_schedule_is_an_error():
    with pytest.raises(ValueError, match="no bundles"):
        count_bundles("hello")
    with pytest.raises(ValueError, match="target can't be read"):
        count_bundles(schedule("{ %2 = sbr.rel target = $region4 }"))


@pytest.mark.slow(2)
def test_a_count_that_stops_before_the_program_ends_is_not_exact():
    endless = LOOP.replace("%s12_s1, 5 /*", "%s12_s1, 4294967295 /*").replace("scmp.ge.s32", "scmp.ge.u32")
    count = count_bundles(schedule(endless.replace("\n\n", "\n")))
    assert not count.is_exact
    assert count.cycles > 8 * 100_000  # what it ran until then


def test_a_schedule_that_is_cut_off_is_an_error_wherever_the_cut_is():
    whole = text_of(grid(6, 8))
    lines = whole.splitlines(keepends=True)
    assert count_bundles(whole).is_exact
    for kept in range(len(lines)):
        with pytest.raises(ValueError, match=r"no bundles|truncated"):
            count_bundles("".join(lines[:kept]))
    last = whole.index("/* exit")
    for end in range(len(whole) - len(lines[-1]), last + 1):  # in the middle of the last bundle
        with pytest.raises(ValueError, match="truncated"):
            count_bundles(whole[:end])
    first = next(n for n, line in enumerate(lines) if " : " in line)
    for missing in range(first, len(lines) - 1):  # a page that was not written
        with pytest.raises(ValueError, match="truncated"):
            count_bundles("".join(lines[:missing] + lines[missing + 1 :]))
