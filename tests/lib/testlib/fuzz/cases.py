"""The cases by name, and running them in forked children.

A crash, a hang or a memory bomb becomes a failure with the name of its case, and does not end the
tests.
"""

import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import traceback
from collections import Counter
from pathlib import Path

from rekindle.data.errors import RekindleError
from testlib.fuzz.described import agreed, description, head, record
from testlib.fuzz.reading import Wrong, read_everything
from testlib.fuzz.signed import (
    batches_changed,
    columns_changed,
    exchanged_and_signed,
    offsets,
    signed,
    values,
    words,
)
from testlib.fuzz.strangers import (
    Stranger,
    cut,
    exchanged,
    exchanged_with_records,
    flipped,
    inserted,
    scrambled,
    spliced,
    zeroed,
)

CASES_PER_CHILD = 300
SECONDS = 30  # for one case, which takes hundredths of a second
ADDRESS_SPACE = 3 << 30  # bytes a child may map beyond its initial size
RESIDENT = 256 << 20  # bytes by which one case may raise the peak; the caches hold about 100 kB


LEVEL_A = {
    "a-flipped": flipped,
    "a-zeroed": zeroed,
    "a-scrambled": scrambled,
    "a-cut": cut,
    "a-inserted": inserted,
    "a-spliced": spliced,
    "a-exchanged": exchanged,
    "a-records": exchanged_with_records,
}
LEVEL_B = {
    "b-words": words,
    "b-flipped": signed(flipped),
    "b-zeroed": signed(zeroed),
    "b-scrambled": signed(scrambled),
    "b-cut": signed(cut),
    "b-inserted": signed(inserted),
    "b-exchanged": exchanged_and_signed,
    "b-offsets": offsets,
    "b-values": values,
    "b-columns": columns_changed,
    "b-batches": batches_changed,
    "b-record": record,
    "b-description": description,
    "b-agreed": agreed,
    "b-head": head,
}
MUTATORS = LEVEL_A | LEVEL_B
# How often each is drawn: those that reach deep code are tried more often.
WEIGHTS = {"b-words": 6, "b-values": 5, "b-offsets": 3, "b-agreed": 5, "b-description": 5}
WEIGHTS |= {"b-record": 4, "b-columns": 3, "a-flipped": 3, "b-flipped": 2}


# --- running cases --------------------------------------------------------------------------------


def run_case(case, stranger, sound):
    """Return None, or what went wrong with one case."""
    template, mutator, seed = case
    stranger.draw = random.Random(f"{template} {mutator} {seed}")
    try:
        MUTATORS[mutator](stranger)
        found = read_everything(stranger.root)
    except Wrong as error:
        return str(error), ""
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if "/lib/" not in f.filename]  # nor are these the tests'
        ours = [f for f in ours if f.filename.endswith(".py")] or frames
        place = f"{Path(ours[-1].filename).name}, {ours[-1].name}"
        return f"{type(error).__name__} in {place}", repr(str(error)[:150])
    finally:
        stranger.restore()
    if mutator in LEVEL_A:
        for step, digest in found.items():
            if mutator == "a-records" and step.endswith(" facts"):
                continue  # sizes and counts come from the records until a shard is opened
            if not isinstance(digest, RekindleError) and digest != sound.get(step):
                return "other data than was written", step
    return None


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def child(cases, first, templates, folder, place, out):
    """Run the cases from ``first`` on, reporting progress; never returns."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESS_SPACE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # also ends a loop in C
    strangers, sound = {}, {}
    with open(out, "a") as told:
        for number in range(first, len(cases)):
            place[:8] = struct.pack("<q", number)
            name = cases[number][0]
            if name not in strangers:
                shutil.copytree(templates[name], folder / name, dirs_exist_ok=True)
                strangers[name] = Stranger(folder / name)
                sound[name] = read_everything(folder / name)
            before = peak()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            wrong = run_case(cases[number], strangers[name], sound[name])
            signal.setitimer(signal.ITIMER_REAL, 0)
            grown = peak() - before
            if wrong is None and grown > RESIDENT:
                wrong = "too much memory", f"{grown:,} bytes"
            if wrong is not None:
                told.write(json.dumps([number, *wrong]) + "\n")
                told.flush()
            if grown > RESIDENT:
                place[:8] = struct.pack("<q", number + 1)
                os._exit(3)  # the peak would hide the next case's
    os._exit(0)


def run_cases(cases, templates, folder):
    """Return (case, what went wrong) of the failures. A few hundred cases run in one child."""
    failed = []
    for start in range(0, len(cases), CASES_PER_CHILD):
        part = cases[start : start + CASES_PER_CHILD]
        first = 0
        while first < len(part):
            first, failures = run_child(part, first, templates, folder)
            failed += failures
    return failed


def run_child(cases, first, templates, folder):
    place = mmap.mmap(-1, 8)
    place[:8] = struct.pack("<q", first)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    out = work / "told.jsonl"
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            child(cases, first, templates, work, place, out)
        except BaseException:
            traceback.print_exc()
        os._exit(2)
    _, status = os.waitpid(process, 0)
    (at,) = struct.unpack("<q", place[:8])
    told = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    failures = [(cases[number], wrong, about) for number, wrong, about in told]
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return len(cases), failures
    if code == 3:
        return at, failures
    assert code < 0, f"the child itself failed at {cases[at]}"
    return at + 1, [*failures, (cases[at], f"died of {signal.Signals(-code).name}", "")]


def cases_of(templates, count, first=0):
    """Return ``count`` cases over all caches and mutators, the same every time."""
    draw = random.Random(f"cases {first}")
    cases = []
    while len(cases) < count:
        mutator = draw.choices([*MUTATORS], [WEIGHTS.get(name, 1) for name in MUTATORS])[0]
        template = "hidden" if mutator == "b-head" else draw.choice(sorted(templates))
        cases.append((template, mutator, first + len(cases)))
    return cases


def explained(failed):
    """Group the failures by what went wrong, with a case of each to rerun."""
    kinds = Counter(wrong for _, wrong, _ in failed)
    first = {wrong: (case, about) for case, wrong, about in reversed(failed)}
    lines = [f"{len(failed)} cases failed, in {len(kinds)} ways:"]
    for wrong, count in kinds.most_common():
        case, about = first[wrong]
        lines.append(f"  {count:4} x {wrong} [{' '.join(map(str, case))}] {about}")
    return "\n".join(lines)
