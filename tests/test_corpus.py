"""Traces of many files: the same statistics and tokens however, wherever and in how many runs they are read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_cases import FakeModel, assert_same, real

from moeplace import corpus, engines, spool
from moeplace.affinity import RoutingStats, RoutingTally, count_routing
from moeplace.corpus import Counted, count_parts
from moeplace.engines import DaskCluster, Engine, InProcess, Processes, Run
from moeplace.errors import InputError, MoeplaceError, OutputError, TraceError, UnreadableError
from moeplace.journal import Journal
from moeplace.parts import BadFile, PartedTrace, TracePart, first_blocks, parted
from moeplace.profile import MOST_DOMAINS, ProfileTally, count_and_profile
from moeplace.readers import _request_part, open_trace, read_trace
from moeplace.split import parse_split, select
from moeplace.spool import spooled
from moeplace.trace import Counts, Trace, concatenate

EXPERTS, TOP_K, LAYERS = 6, 2, (1, 3)


def write_requests(folder: Path, count: int, seed: int = 0) -> Path:
    """Write requests of two subjects, each of a few prompt and decode tokens."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        steps = [
            {"0": None}
            | {str(layer): [rng.permutation(EXPERTS)[:TOP_K].tolist() for _ in range(size)] for layer in LAYERS}
            for size in (int(rng.integers(1, 6)), *[1] * int(rng.integers(0, 4)))
        ]
        path = folder / ("art", "law")[number % 2] / f"{number:04d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(steps))
    return folder


def opened(path: Path, **options: Any) -> PartedTrace:
    """Open a folder or archive that can be read part by part."""
    whole = parted(open_trace(path, **options))
    assert whole is not None
    return whole


def serial(path: Path, **options: Any) -> RoutingStats:
    """Statistics of the stream of all files."""
    source = open_trace(path, **options)
    assert not isinstance(source, Counts)
    return count_routing(source, sample_tokens=9)


class Shuffled(Engine):
    """Reads all parts and gives the results in a random order, like workers of different speed; may be cut off."""

    workers = 3

    def __init__(self, seed: int, stop_after: int | None = None) -> None:
        self._seed, self._stop_after = seed, stop_after
        self.files_read = 0

    def run(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Yield results until it is cut off."""
        parts = list(items)
        for number, i in enumerate(np.random.default_rng(self._seed).permutation(len(parts))):
            if number == self._stop_after:
                raise KeyboardInterrupt
            self.files_read += len(parts[i].files)
            yield work(parts[i])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty requests."""
    return write_requests(tmp_path / "corpus", 40)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a few files, and progress that is kept after each."""
    monkeypatch.setattr(corpus, "SMALLEST_PART_BYTES", 400)
    monkeypatch.setattr(spool, "PART_BYTES", 400)
    monkeypatch.setattr(corpus, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(corpus, "SAVE_SHARE", 1e9)


def run(tmp_path: Path, engine: Engine | None = None) -> Run:
    """A run that keeps its progress in the test's folder."""
    return Run(engine=engine or InProcess(), work_dir=str(tmp_path / "work"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("model", [None, FakeModel(num_experts=9, moe_layer_ids=LAYERS)])
def test_any_order_gives_the_statistics_of_the_stream(folder: Path, tmp_path: Path, seed: int, model: Any) -> None:
    """Map and reduce in any order gives the counts, sample and digest of one walk, and leaves nothing behind."""
    expected = serial(folder, model=model)
    counted = count_parts(opened(folder, model=model), run(tmp_path, Shuffled(seed)), sample_tokens=9)
    assert counted.stats.digest() == expected.digest()
    assert counted.stats.meta == expected.meta
    source = open_trace(folder, model=model)
    assert not isinstance(source, Counts)
    _, profile = count_and_profile(source)
    for name in ("tokens", "load", "group_tokens", "group_load", "following"):
        assert np.array_equal(getattr(counted.profile, name), getattr(profile, name)), name
    assert list((tmp_path / "work").iterdir()) == []


def test_an_archive_counts_as_its_folder(folder: Path, tmp_path: Path) -> None:
    """Files of a plain tar archive are read apart too; those of a compressed one can only be streamed."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for path in sorted(folder.rglob("*.json"), reverse=True):
            archive.add(path, str(path.relative_to(folder)))
    counted = count_parts(opened(tmp_path / "x.tar"), run(tmp_path, Shuffled(0)))
    assert counted.stats.trace_digest == serial(folder).trace_digest
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(folder, "corpus")
    assert parted(open_trace(tmp_path / "x.tar.gz")) is None
    assert parted(read_trace(folder)) is None


@pytest.mark.parametrize("stop_after", [0, 1, 5])
def test_an_interrupted_run_goes_on(folder: Path, tmp_path: Path, stop_after: int) -> None:
    """What was finished before Ctrl-C is not read again, and the result is that of one run."""
    first = Shuffled(1, stop_after)
    with pytest.raises(KeyboardInterrupt):
        count_parts(opened(folder), run(tmp_path, first), sample_tokens=9)
    second = Shuffled(2)
    counted = count_parts(opened(folder), run(tmp_path, second), sample_tokens=9)
    assert first.files_read + second.files_read == 40
    assert counted.stats.digest() == serial(folder).digest()


def test_a_changed_file_is_another_run(folder: Path, tmp_path: Path) -> None:
    """Progress belongs to the files as they were: one that has changed since starts anew."""
    with pytest.raises(KeyboardInterrupt):
        count_parts(opened(folder), run(tmp_path, Shuffled(0, 3)))
    write_requests(folder / "more", 1)
    engine = Shuffled(0)
    count_parts(opened(folder), run(tmp_path, engine))
    assert engine.files_read == 41


@pytest.mark.parametrize("archive", [False, True])
def test_a_file_changed_within_its_size_is_another_run(folder: Path, tmp_path: Path, archive: bool) -> None:
    """Other ids of as many bytes, and the old time of change put back: what is kept is not used."""
    path = tmp_path / "c.tar" if archive else folder

    def changed(text: str) -> None:
        file = folder / "art" / "0000.json"
        before = file.stat()
        file.write_text(text)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        if archive:
            was = path.stat() if path.exists() else None
            with tarfile.open(path, "w") as out:
                out.add(folder, arcname=".")
            if was is not None:
                os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))

    changed(json.dumps([{"0": None, "1": [[0, 1]], "3": [[2, 3]]}]))
    with pytest.raises(KeyboardInterrupt):
        count_parts(opened(path), run(tmp_path, Shuffled(0, 3)), sample_tokens=9)
    size = path.stat().st_size
    changed(json.dumps([{"0": None, "1": [[4, 5]], "3": [[2, 3]]}]))
    assert path.stat().st_size == size
    engine = Shuffled(0)
    counted = count_parts(opened(path), run(tmp_path, engine), sample_tokens=9)
    assert engine.files_read == 40
    assert counted.stats.trace_digest == serial(path).trace_digest


@pytest.mark.parametrize("by_signal", [False, True])
def test_an_interrupt_within_a_merge_spoils_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_signal: bool
) -> None:
    """Ctrl-C half way through a merge waits for its end; whatever else breaks it off, the state before it is kept."""
    merge, count = ProfileTally.merge, iter(range(100))

    def broken(self: ProfileTally, other: ProfileTally) -> None:
        if next(count) == 5:
            if not by_signal:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGINT)
        merge(self, other)

    first, second = Shuffled(1), Shuffled(2)
    with monkeypatch.context() as patch:
        patch.setattr(ProfileTally, "merge", broken)
        with pytest.raises(KeyboardInterrupt):
            count_parts(opened(folder), run(tmp_path, first), sample_tokens=9)
    counted = count_parts(opened(folder), run(tmp_path, second), sample_tokens=9)
    assert counted.stats.digest() == serial(folder).digest()
    assert second.files_read < 40


def test_ctrl_c_at_the_results_loses_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file that was counted is kept when the run is stopped while results are made."""

    def stopped(self: RoutingTally, meta: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RoutingTally, "result", stopped)
        with pytest.raises(KeyboardInterrupt):
            count_parts(opened(folder), run(tmp_path, Shuffled(1)))
    engine = Shuffled(2)
    count_parts(opened(folder), run(tmp_path, engine))
    assert engine.files_read == 0


@pytest.mark.parametrize("command", ["count", "spool"])
def test_a_file_that_could_not_be_read_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A file that the system did not open in one run is read by the next, and is not bad any more."""
    read = _request_part.read_document

    def refused(source: str, document: Any) -> bytes | InputError:
        if document.name.endswith("0007.json"):
            return UnreadableError("cannot be opened: Input/output error")
        return read(source, document)

    with monkeypatch.context() as patch:
        patch.setattr(_request_part, "read_document", refused)
        if command == "count":
            with pytest.raises(TraceError, match="1 of 40 files cannot be read"):
                count_parts(opened(folder), run(tmp_path, Shuffled(1)), sample_tokens=9)
        else:
            with pytest.raises(TraceError, match="1 of 40 files"), spooled(opened(folder), run(tmp_path)):
                pass
    engine = Shuffled(2)
    if command == "count":
        counted = count_parts(opened(folder), run(tmp_path, engine), sample_tokens=9)
        assert counted.stats.digest() == serial(folder).digest()
        assert engine.files_read == 1
    else:
        with spooled(opened(folder), run(tmp_path, engine)) as found:
            assert_same(concatenate(found.blocks(), found.meta), read_trace(folder))
        assert 1 <= engine.files_read < 40


def test_a_spool_outlives_ctrl_c_and_a_full_disk(folder: Path, tmp_path: Path) -> None:
    """What was read is used by the next try, whether the user stopped the writing or it failed."""
    for stop in (KeyboardInterrupt(), OutputError("cannot be written: No space left on device")):
        engine = Shuffled(0)
        with pytest.raises(type(stop)), spooled(opened(folder), run(tmp_path, engine)):
            raise stop
        again = Shuffled(0)
        with spooled(opened(folder), run(tmp_path, again)):
            pass
        assert (engine.files_read, again.files_read) == (40, 0)


def test_processes_end_while_they_send_results() -> None:
    """Closing does not wait for the rest of a result that an ended worker had begun to send."""
    code = (
        "import sys, time\n"
        "from moeplace.engines import Processes\n"
        "if __name__ == '__main__':\n"
        "    engine = Processes(2)\n"
        "    results = engine.run(bytearray, [1 << 26] * 8)\n"
        "    next(results)\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    engine.close()\n"
    )
    for delay in (0.0, 0.02, 0.05):
        subprocess.run([sys.executable, "-c", code, str(delay)], check=True, timeout=60)


def test_damaged_progress_is_left(folder: Path, tmp_path: Path) -> None:
    """Progress that cannot be read counts as none."""
    with pytest.raises(KeyboardInterrupt):
        count_parts(opened(folder), run(tmp_path, Shuffled(0, 3)))
    (state,) = (tmp_path / "work").rglob("state.npz")
    state.write_bytes(state.read_bytes()[:100])
    assert count_parts(opened(folder), run(tmp_path)).stats.trace_digest == serial(folder).trace_digest


def damage(folder: Path) -> None:
    """Add three files that are no requests of the model."""
    (folder / "art" / "cut.json").write_text('[{"1": [[0, 1]]')
    (folder / "art" / "other.json").write_text(json.dumps([{"1": [[0, 1]], "2": [[0, 1]]}]))
    (folder / "law" / "twice.json").write_text(json.dumps([{"0": None, "1": [[0, 1]], "3": [[2, 2]]}]))


def test_bad_files_are_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    """Every bad file is named with its reason, once, and the others count as if it were not there."""
    alone = serial(folder)
    damage(folder)
    counted = count_parts(opened(folder, skip_bad=None), run(tmp_path, Shuffled(0)), sample_tokens=9)
    assert [file.name for file in counted.bad] == ["art/cut.json", "art/other.json", "law/twice.json"]
    for file, reason in zip(
        counted.bad, ("not JSON", "2 layers 1..2", "layer 3, token 0: expert 2 stands twice"), strict=True
    ):
        assert reason in file.reason
        assert f"{folder}/{file.name}" in file.reason
    assert np.array_equal(counted.stats.load, alone.load)
    assert "3 of 43 files break the format and are left out" in counted.stats.meta.assumptions
    with spooled(opened(folder, skip_bad=None), run(tmp_path, Shuffled(0))) as tokens:
        assert [file.name for file in tokens.bad] == [file.name for file in counted.bad]


def test_too_many_bad_files_are_refused_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    """A limit of bad files that is exceeded is an error with the first of them; what was counted is kept."""
    damage(folder)
    with pytest.raises(TraceError, match="3 of 43 files break the format") as caught:
        count_parts(opened(folder, skip_bad=2), run(tmp_path))
    assert "cut.json" in str(caught.value)
    engine = Shuffled(0)
    assert len(count_parts(opened(folder, skip_bad=3), run(tmp_path, engine)).bad) == 3
    assert engine.files_read == 0


def test_a_folder_of_bad_files_is_refused(tmp_path: Path) -> None:
    """Where no file is a request there are no statistics."""
    (tmp_path / "a").mkdir()
    for name in ("1.json", "2.json"):
        (tmp_path / "a" / name).write_text('[{"1": [[0, 0]]}]')
    for skip_bad in (None, 0, 5):
        with pytest.raises(TraceError, match="2 of 2 files break the format") as caught:
            open_trace(tmp_path / "a", skip_bad=skip_bad)
        assert "twice" in str(caught.value)


@pytest.mark.parametrize("stop_after", [None, 0, 4])
def test_a_spool_holds_the_tokens_of_the_stream(folder: Path, tmp_path: Path, stop_after: int | None) -> None:
    """Spooled in any order and in several runs, a trace is that of the stream, in recorded order; then it is gone."""
    expected = read_trace(folder)
    assert isinstance(expected, Trace)
    if stop_after is not None:
        with pytest.raises(KeyboardInterrupt), spooled(opened(folder), run(tmp_path, Shuffled(3, stop_after))):
            pass
    with spooled(opened(folder), run(tmp_path, Shuffled(4))) as tokens:
        for _ in range(2):
            assert_same(concatenate(tokens.blocks(), tokens.meta), expected)
        assert len(tokens.files) > 5
    assert list((tmp_path / "work").iterdir()) == []


def test_workers_never_hear_ctrl_c() -> None:
    """Workers are started with Ctrl-C blocked, so that none shows a traceback before it can ignore it."""
    with Processes(1) as engine:
        assert list(engine.run(_blocked_signals, [0])) == [[signal.SIGINT]]
    assert _blocked_signals(0) == []


def _blocked_signals(_: int) -> list[int]:
    return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize(
    ("error", "kept"),
    [(KeyboardInterrupt(), True), (SystemExit(143), True), (OutputError("full"), True), (ValueError(), False)],
)
def test_what_ends_the_work_decides_whether_a_spool_is_kept(
    folder: Path, tmp_path: Path, error: BaseException, kept: bool
) -> None:
    """Stopped, or with an output that cannot be written, the next run reads nothing again; another error ends it."""
    with pytest.raises(type(error)), spooled(opened(folder), run(tmp_path)):
        raise error
    engine = Shuffled(0)
    with spooled(opened(folder), run(tmp_path, engine)):
        assert (engine.files_read == 0) == kept


@pytest.mark.parametrize(("split", "phase"), [("half:1", None), ("domain:law", "decode"), (None, "prefill")])
def test_a_part_of_a_corpus_is_read_part_by_part(
    folder: Path, tmp_path: Path, split: str | None, phase: str | None
) -> None:
    """A split, a phase or both of a trace of many files give what they give of the stream."""
    rule = parse_split(split) if split else None
    streamed = select(concatenate(_blocks(folder), _meta(folder)), split=rule, phase=phase)
    apart = parted(select(open_trace(folder), split=rule, phase=phase))
    assert apart is not None
    assert isinstance(streamed, Trace) or not isinstance(streamed, Counts)
    assert count_parts(apart, run(tmp_path, Shuffled(0))).stats.digest() == count_routing(streamed).digest()


def _blocks(folder: Path) -> list[Trace]:
    source = open_trace(folder)
    assert not isinstance(source, Counts)
    return list(source.blocks())


def _meta(folder: Path) -> Any:
    return open_trace(folder).meta


def test_an_empty_selection_is_an_error(folder: Path, tmp_path: Path) -> None:
    """Requests without decode tokens leave nothing of that phase."""
    for path in folder.rglob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    apart = parted(select(open_trace(folder), phase="decode"))
    assert apart is not None
    with pytest.raises(TraceError, match="no tokens"):
        count_parts(apart, run(tmp_path))


def test_the_beginning_is_looked_at_without_a_walk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first blocks of a trace of many files are those of the stream, read as far as they are asked for."""
    monkeypatch.setattr("moeplace.parts.LOOK_BYTES", 400)
    source = open_trace(folder)
    assert not isinstance(source, Counts)
    blocks = list(first_blocks(source))
    assert len(blocks) > 5
    assert np.array_equal(np.concatenate([block.experts for block in blocks]), _blocks(folder)[0].experts)


def test_watchers_see_every_file_once(folder: Path, tmp_path: Path) -> None:
    """Progress grows from nothing to all files and bytes."""
    seen: list[tuple[int, int, int]] = []
    source = opened(folder)
    count_parts(source, Run(engine=Shuffled(0), work_dir=str(tmp_path), watch=lambda *now: seen.append(now)))
    assert seen[0] == (0, 0, 0)
    assert seen == sorted(seen)
    assert seen[-1] == (40, int(source.file_bytes.sum()), 0)


def _fails(part: TracePart) -> Any:
    raise TraceError(f"part {part.files[0]}")


def _dies(part: TracePart) -> Any:
    import os

    os._exit(9)


def test_processes_count_alike_and_their_errors_come_back(folder: Path, tmp_path: Path) -> None:
    """Two processes give the same statistics; an error in one is the run's, and a dead one is told."""
    source = opened(folder)
    with Processes(2) as engine:
        counted = count_parts(source, run(tmp_path, engine), sample_tokens=9)
        assert counted.stats.digest() == serial(folder).digest()
        with pytest.raises(TraceError, match="part 0"):
            list(engine.run(_fails, source.parts(10**9)))
        with pytest.raises(MoeplaceError, match="worker process has died"):
            list(engine.run(_dies, source.parts(10**9)))


KILLED = """
import sys, time
from moeplace import corpus
from moeplace.engines import Processes, Run
from moeplace.parts import parted
from moeplace.readers import open_trace

class Slow(corpus.CountPart):
    def __call__(self, part):
        time.sleep(0.02)
        return super().__call__(part)

if __name__ == "__main__":
    corpus.SMALLEST_PART_BYTES, corpus.SAVE_EVERY_S, corpus.SAVE_SHARE = 2000, 0.0, 1e9
    corpus.CountPart = Slow
    print("begun", flush=True)
    with Processes(2) as engine:
        counted = corpus.count_parts(parted(open_trace(sys.argv[1])), Run(engine=engine, work_dir=sys.argv[2]))
"""


def test_two_thousand_files_survive_a_kill(tmp_path: Path) -> None:
    """A killed run loses no file that was finished, leaves no process behind, and ends with the same digest."""
    folder = write_requests(tmp_path / "corpus", 2000)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    child = subprocess.Popen([sys.executable, str(script), str(folder), str(tmp_path / "work")], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    deadline = time.monotonic() + 60
    while not (kept := list((tmp_path / "work").rglob("state.npz"))) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1 + 0.3 * np.random.default_rng(time.time_ns()).random())
    child.send_signal(signal.SIGKILL)
    child.wait()
    with np.load(kept[0], allow_pickle=False) as state:
        done = len(state["files"])
    assert 0 < done < 2000
    engine = Shuffled(0)
    counted = count_parts(opened(folder), run(tmp_path, engine))
    assert engine.files_read == 2000 - done
    assert counted.stats.digest() == count_routing(concatenate(_blocks(folder), _meta(folder))).digest()
    assert child.stdout.read() == b""  # ends only when every process that has it open is gone


def test_a_cluster_counts_alike(folder: Path, tmp_path: Path) -> None:
    """Workers of a Dask cluster give the same statistics and tokens."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        with DaskCluster(cluster.scheduler_address) as engine:
            assert engine.workers == 2
            counted = count_parts(opened(folder), run(tmp_path, engine), sample_tokens=9)
        assert counted.stats.digest() == serial(folder).digest()
        with DaskCluster(cluster.scheduler_address) as engine, spooled(opened(folder), run(tmp_path, engine)) as tokens:
            assert concatenate(tokens.blocks(), tokens.meta).digest() == counted.stats.trace_digest


@pytest.mark.parametrize(
    ("address", "what"), [("tcp://127.0.0.1:9", "no Dask scheduler answers"), ("no.json", "no Dask")]
)
def test_a_cluster_that_does_not_answer_is_told(address: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An address without a scheduler, or a missing scheduler file, is an error with what to do."""
    pytest.importorskip("distributed")
    monkeypatch.setattr(engines, "ANSWER_WITHIN_S", 0.5)
    with pytest.raises(InputError, match=f"no Dask scheduler answers at {address}") as caught:
        DaskCluster(address)
    assert "dask scheduler" in str(caught.value.hint)


def test_the_real_request_counts_alike(tmp_path: Path) -> None:
    """The recorded request of Llama-4, three times under other names, counts as streamed."""
    sample = real("format_samples/llama4_sglang_json/0.json")
    for name in ("0", "1", "2"):
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{name}.json").write_bytes(sample.read_bytes())
    counted: Counted = count_parts(opened(tmp_path / "c"), run(tmp_path, Shuffled(0)), sample_tokens=9)
    assert counted.stats.digest() == serial(tmp_path / "c").digest()
    assert counted.stats.num_tokens == 3 * 153


def test_bad_files_print_as_their_reason() -> None:
    """A bad file is shown as the error that it gave."""
    assert str(BadFile(name="a", reason="a: not JSON")) == "a: not JSON"


def _request(top_k: int, layers: Iterable[int], first: int = 0) -> str:
    return json.dumps([{str(layer): [list(range(first, first + top_k))] for layer in layers}])


@pytest.mark.parametrize("container", ["folder", "tar", "tar.gz"])
def test_a_foreign_first_file_does_not_decide(folder: Path, tmp_path: Path, container: str) -> None:
    """The trace is of the model that most of the first files are of; the other one is left out and named."""
    (folder / "art" / "!first.json").write_text(_request(1, LAYERS))
    path = folder
    if container != "folder":
        path = tmp_path / f"c.{container}"
        with tarfile.open(path, "w:gz" if container.endswith("gz") else "w") as out:
            for file in sorted(folder.rglob("*.json"))[1:] + sorted(folder.rglob("*.json"))[:1]:
                out.add(file, arcname=str(file.relative_to(folder)))
    stream = open_trace(path, skip_bad=None)
    assert not isinstance(stream, Counts)
    assert sum(block.num_tokens for block in stream.blocks()) == sum(
        block.num_tokens
        for block in open_trace(folder, skip_bad=None).blocks()  # type: ignore[union-attr]
    )
    assert stream.meta.top_k == TOP_K


def test_many_bad_files_are_refused_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    """A folder of which a third is of another model is most likely a mistake; --skip-bad N says that it is not."""
    for number in range(20):
        (folder / "law" / f"x{number}.json").write_text(_request(1, LAYERS))
    with pytest.raises(TraceError, match="20 of 60 files break the format") as caught:
        count_parts(opened(folder, skip_bad=None), run(tmp_path))
    assert "--skip-bad" in str(caught.value)
    assert len(count_parts(opened(folder, skip_bad=20), run(tmp_path)).bad) == 20


def test_a_compressed_archive_leaves_bad_files_out_too(folder: Path, tmp_path: Path) -> None:
    """As a folder does: with the default, and with a number; and they are listed."""
    damage(folder)
    path = tmp_path / "c.tar.gz"
    with tarfile.open(path, "w:gz") as out:
        out.add(folder, arcname=".")
    for skip_bad in (None, 3):
        stream = open_trace(path, skip_bad=skip_bad)
        assert not isinstance(stream, Counts)
        stats, _ = count_and_profile(stream)
        assert stats.num_requests == 40
        assert len(getattr(stream, "bad_files")) == 3  # noqa: B009
    with pytest.raises(TraceError):
        list(open_trace(path, skip_bad=1).blocks())  # type: ignore[union-attr]


@pytest.mark.parametrize("domains", [256, 300])
def test_many_domains(tmp_path: Path, domains: int) -> None:
    """One folder for each request: as many domains as are told apart, and one for all others."""
    for number in range(domains):
        path = tmp_path / "corpus" / f"d{number:03d}" / "r.json"
        path.parent.mkdir(parents=True)
        path.write_text(_request(TOP_K, LAYERS, number % 4))
    counted = count_parts(opened(tmp_path / "corpus"), run(tmp_path))
    tokens = counted.profile.tokens.sum(axis=0)
    assert len(tokens) == MOST_DOMAINS + 1
    assert tokens.sum() == domains
    assert tokens[-1] == domains - MOST_DOMAINS
    assert counted.profile.meta.domains[-1] == f"{domains - MOST_DOMAINS} others"


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    """A folder that stands elsewhere is read; one that leads back, or to one that was met, adds nothing."""
    elsewhere = write_requests(tmp_path / "elsewhere", 6, seed=5)
    (folder / "more").symlink_to(elsewhere)
    (folder / "back").symlink_to(folder)
    (folder / "again").symlink_to(folder / "more")
    assert len(opened(folder).file_bytes) == 46


@pytest.mark.parametrize("name", [b"caf\xe9.json", b"two\nlines.json"])
def test_names_that_are_no_text_are_escaped(folder: Path, tmp_path: Path, name: bytes) -> None:
    """Such a file is read, named by escapes wherever it is told, and counted like any other."""
    path = os.fsencode(folder / "art") + b"/" + name
    Path(os.fsdecode(path)).write_text(_request(TOP_K, LAYERS))
    counted = count_parts(opened(folder), run(tmp_path))
    assert counted.stats.num_requests == 41
    assert all(shown.isprintable() and shown.encode() for shown in counted.stats.meta.request_names)
    Path(os.fsdecode(path)).write_text("[")
    (bad,) = count_parts(opened(folder, skip_bad=1), run(tmp_path)).bad
    assert bad.name.isprintable()
    assert bad.reason.splitlines()[0].encode()


def test_one_wild_id_does_not_size_the_tables(folder: Path, tmp_path: Path) -> None:
    """Without a model, an id far beyond any known one is damage of its file, which is named."""
    (folder / "art" / "wild.json").write_text(_request(TOP_K, LAYERS, 20_000))
    counted = count_parts(opened(folder, skip_bad=None), run(tmp_path))
    assert counted.stats.meta.num_experts == EXPERTS
    assert [file.name for file in counted.bad] == ["art/wild.json"]
    assert "--model" in counted.bad[0].reason


def test_an_archive_whose_first_request_stands_far_behind(folder: Path, tmp_path: Path) -> None:
    """A large file before the first JSON does not hide the format."""
    (folder / "blob.bin").write_bytes(bytes(200_000))
    path = tmp_path / "late.tar"
    with tarfile.open(path, "w") as out:
        out.add(folder / "blob.bin", arcname="blob.bin")
        out.add(folder / "art", arcname="art")
    assert len(opened(path).file_bytes) == 20


def test_a_second_interrupt_waits_until_progress_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told to be kept is kept: Ctrl-C again while it is written loses nothing."""
    monkeypatch.setattr(corpus, "SAVE_EVERY_S", 1e9)
    real = Journal.save

    def again(self: Journal, name: str, arrays: Any) -> Path:
        signal.raise_signal(signal.SIGINT)
        return real(self, name, arrays)

    first, second = Shuffled(1, 5), Shuffled(2)
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "save", again)
        with pytest.raises(KeyboardInterrupt):
            count_parts(opened(folder), run(tmp_path, first))
    count_parts(opened(folder), run(tmp_path, second))
    assert first.files_read + second.files_read == 40


def _blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_cluster_without_workers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every worker of a cluster is gone the run ends with an error, with what to do."""

    class _Waiting:
        def add_done_callback(self, _: Any) -> None:
            """Never done."""

    class Gone:
        def submit(self, *_: Any, **__: Any) -> Any:
            return _Waiting()

        def nthreads(self) -> dict[str, int]:
            return {}

    monkeypatch.setattr(engines, "ASK_EVERY_S", 0.01)
    monkeypatch.setattr(engines, "LOST_AFTER_S", 0.03)
    cluster = DaskCluster.__new__(DaskCluster)
    cluster._client, cluster.workers = Gone(), 1
    with pytest.raises(MoeplaceError, match="lost all its workers"):
        list(cluster.run(_blocked, range(3)))
