"""How a command ends: one exit code for process, record and metrics, whoever leaves, and whatever is missing."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from batch import alive, children, spoil, start, wait_for, write_cities
from commands import PATIENCE_S, environment, shell

DONE, PARTIAL, BAD_DATA, NO_INPUT, IO_ERROR, TRY_AGAIN, BAD_BUNDLE, TERMINATED = 0, 3, 65, 66, 74, 75, 76, 143


@pytest.fixture
def many(desk):
    """Ten cities in ``many/`` beside the bundle."""
    write_cities(desk.folder / "many", desk.folder, [f"c{i}" for i in range(10)])
    return desk.folder


def record(folder):
    return json.loads((folder / "out" / "_run.json").read_text())


def metric(folder):
    lines = (folder / "x.prom").read_text().splitlines()
    return int(next(line.split()[-1] for line in lines if line.startswith("topt_run_exit_code")))


BATCH = "topt-run predict many --bundle model.topt --out out --workers 1 --metrics-file x.prom"


class TestOneCode:
    def test_a_reader_that_leaves(self, many):
        command = f"{BATCH} --log-format json | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}"
        said = subprocess.run(["bash", "-c", command], cwd=many, env=environment(), capture_output=True, text=True)
        assert said.returncode == IO_ERROR, said
        assert record(many)["exit_code"] == metric(many) == IO_ERROR
        assert sum(record(many)["cities"].values()) < 10

    @pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, TERMINATED), (signal.SIGINT, 130)])
    def test_a_signal(self, how, code, many):
        process = start(BATCH.split(), many)
        wait_for(lambda: list(many.glob("out/city=*/*.receipt.json")), "a first city")
        process.send_signal(how)
        _, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code, err
        assert "Traceback" not in err
        assert record(many)["exit_code"] == metric(many) == code
        assert shell(f"{BATCH} --resume", many).code == DONE
        assert record(many)["exit_code"] == metric(many) == DONE
        assert not [file for file in many.glob("out/**/.*") if ".lock" not in file.name]

    def test_one_city_and_a_signal(self, desk, monkeypatch):
        code = "import os, signal; from topt_deploy.runtime import predict_city as c\n"
        code += "c._key = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        code += "from topt_deploy.runtime.cli import main; main()"
        arguments = ["predict", "regions.parquet", "--metrics-file", "x.prom"]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=desk.folder, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == metric(desk.folder) == TERMINATED
        assert "terminated" in done.stderr

    def test_a_bug(self, desk, topt_run, monkeypatch):
        monkeypatch.setattr("topt_deploy.runtime.predict_city.read_receipt", lambda *_: 1 / 0)
        said = topt_run("predict", desk.regions, "--resume", "--metrics-file", desk.folder / "x.prom")
        assert said.code == metric(desk.folder) == 70


class TestStreams:
    @pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
    def test_closed_ones_are_no_error(self, closed, desk):
        said = shell(f"topt-run predict regions.parquet {closed}", desk.folder)
        assert (said.code, said.err) == (DONE, "")
        assert pq.read_table(desk.out).num_rows == 231

    def test_a_full_one_is_said(self, desk):
        said = shell("topt-run predict regions.parquet > /dev/full", desk.folder)
        assert said.code == IO_ERROR
        assert "standard output" in said.err

    def test_another_files_failure_is_not_blamed_on_them(self, desk, topt_run, monkeypatch):
        def fail(*_):
            raise OSError(errno.EIO, "Input/output error", "/some/file")

        monkeypatch.setattr("topt_deploy.runtime.predict_city._key", fail)
        said = topt_run("predict", desk.regions)
        assert said.code == IO_ERROR
        assert "/some/file" in said.err
        assert "standard output" not in said.err


class TestFileSystems:
    def test_one_without_locks(self, desk, topt_run, monkeypatch):
        def none(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", none)
        said = topt_run("predict", desk.regions)
        assert said.code == DONE
        assert "has no locks" in said.err

    def test_a_lock_that_fails_otherwise_names_the_output(self, desk, topt_run, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(fcntl, "flock", broken)
        said = topt_run("predict", desk.regions)
        assert said.code == IO_ERROR
        assert "predictions.parquet" in said.err

    def test_folders_that_cannot_be_flushed(self, desk, topt_run, monkeypatch):
        flush = os.fsync

        def plain_files(descriptor):
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.EINVAL, "Invalid argument")
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", plain_files)
        assert topt_run("predict", desk.regions).code == DONE


class TestInputs:
    @pytest.mark.parametrize("what", ["regions", "bundle", "mobility", "--require-signature"])
    @pytest.mark.parametrize("kind", ["pipe", "loop", "not a folder"])
    def test_what_is_no_file_is_not_tried_again(self, what, kind, desk, topt_run):
        place = desk.folder / "odd"
        if kind == "pipe":
            os.mkfifo(place)
        elif kind == "loop":
            place.symlink_to(place)
        else:
            place = desk.regions / "odd"
        arguments = {
            "regions": (place, "--bundle", desk.bundle),
            "bundle": (desk.regions, "--bundle", place),
            "mobility": (desk.regions, "--mobility", place),
            "--require-signature": (desk.regions, what, place),
        }[what]
        said = topt_run("predict", *arguments)
        assert said.code in (2, BAD_DATA, NO_INPUT, BAD_BUNDLE), said.err

    @pytest.mark.parametrize("command", ["one city", "a map", "a batch", "a self-test"])
    def test_files_that_may_be_open_are_few(self, command, many):
        words = {
            "one city": "topt-run predict regions.parquet",
            "a map": "topt-run predict regions.parquet --geo map.geojson",
            "a batch": "topt-run predict many --bundle model.topt --out out --workers 2",
            "a self-test": "topt-run selftest model.topt",
        }[command]
        codes = {}
        for number in (6, 7, 8, 10, 12, 16):  # with fewer Python does not start
            said = shell(f"ulimit -n {number}; {words}", many)
            codes[number] = said.code
            assert said.code in (DONE, TRY_AGAIN), (number, said)
            assert said.code == DONE or "too many files are open" in said.err, (number, said)
        assert codes[16] == DONE

    @pytest.mark.parametrize(("short", "code"), [(errno.ENOMEM, TRY_AGAIN), (errno.EMFILE, TRY_AGAIN), (errno.EIO, 70)])
    def test_libraries_that_cannot_be_loaded(self, short, code, desk, topt_run, monkeypatch):
        def fail(*_):
            raise ImportError(f"x.so: cannot open shared object file: {os.strerror(short)}")

        monkeypatch.setattr("topt_deploy.runtime.predict_city._key", fail)
        assert topt_run("predict", desk.regions).code == code

    def test_memory_that_is_short_is_said_so(self, desk):
        kib = 900 * 1024

        def limit():
            resource.setrlimit(resource.RLIMIT_AS, (kib * 1024, kib * 1024))

        for share in (0.25, 0.3, 0.35, 0.4, 0.5):
            size = int(kib * share) * 1024
            said = shell(
                "topt-run predict regions.parquet", desk.folder,
                before=lambda size=size: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
            )  # fmt: skip
            assert said.code in (DONE, IO_ERROR, TRY_AGAIN, 1, 127, -6, -11) or "import" in said.err, (share, said)
            assert "cut off" not in said.err


ZEROS = "0" * 64
RECEIPTS = {
    "status": lambda r: r.update(status=3),
    "a status that is a metric": lambda r: r.update(status={'x"} 1\ntopt_run_exit_code 0\n#': 1}),
    "no rows": lambda r: r["set_aside"].update(regions={"file": "predictions.quarantine.parquet", "sha256": "0" * 64}),
    "another folder's rows": lambda r: r["set_aside"].update(
        regions={"file": "../../x", "sha256": "0" * 64, "rows": {}}
    ),
    "seconds": lambda r: r.update(seconds={"predict": "long"}),
    "a list": lambda r: r.update(output=[]),
    "no key": lambda r: r.pop("key"),
    "a number without end": lambda r: r["status"].update(ok=10**30),
    "another file": lambda r: r["output"].update(file="x"),
}


class TestReceipts:
    @pytest.mark.parametrize("change", RECEIPTS)
    def test_an_odd_one_is_none(self, change, desk, topt_run):
        assert topt_run("predict", desk.regions).code == DONE
        receipt = json.loads(desk.receipt.read_text())
        RECEIPTS[change](receipt)
        desk.receipt.write_text(json.dumps(receipt))
        said = topt_run("predict", desk.regions, "--resume", "--metrics-file", desk.folder / "x.prom")
        assert said.code == DONE, said.err
        assert "as they were" not in said.out
        assert (desk.folder / "x.prom").read_text().count("topt_run_exit_code ") == 3

    @pytest.mark.parametrize("data", [b"", b"[", b"[]", b"null", b"\xff", b"[" * 100_000, b" " * (2 << 20)])
    def test_bytes_are_none(self, data, desk, topt_run):
        assert topt_run("predict", desk.regions).code == DONE
        desk.receipt.write_bytes(data)
        assert topt_run("predict", desk.regions, "--resume").code == DONE

    def test_a_pipe_in_its_place_is_not_waited_for(self, many):
        assert shell(BATCH, many).code == DONE
        (city,) = many.glob("out/city=c3")
        (city / "predictions.receipt.json").unlink()
        os.mkfifo(city / "predictions.receipt.json")
        said = shell(f"{BATCH} --resume", many)
        assert said.code == PARTIAL
        assert "predictions.receipt.json" in said.err


@pytest.mark.slow
class TestWorkers:
    def worker(self, many, work):
        """A batch whose workers do ``work`` at city c3."""
        code = f"""
import os, signal, time
from topt_deploy.runtime import predict_city
from topt_deploy.runtime.batch import city_task
real = predict_city.predict_city
def odd(predictor, job, *args, **more):
    if job.name == "c3":
        with open("tries", "a") as file:
            file.write("x")
        {work}
    return real(predictor, job, *args, **more)
city_task.predict_city = odd
from topt_deploy.runtime.cli import main
main()
"""
        return [sys.executable, "-c", code, *BATCH.split()[1:]]

    @pytest.mark.parametrize("how", ["SIGFPE", "SIGABRT", "SIGSEGV"])
    def test_one_that_a_graph_ends_is_not_tried_again(self, how, many):
        # abort() ends a process whatever handles its signal.
        command = self.worker(many, "os.abort()" if how == "SIGABRT" else f"os.kill(os.getpid(), signal.{how})")
        done = subprocess.run(command, cwd=many, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == PARTIAL, done.stderr
        assert (many / "tries").read_text() == "x"
        (failed,) = record(many)["failed"]
        assert (failed["city"], failed["exit_code"]) == ("c3", BAD_BUNDLE)
        assert how in failed["message"]

    def test_one_that_is_killed_is(self, many):
        command = self.worker(many, "os.kill(os.getpid(), signal.SIGKILL)")
        done = subprocess.run(command, cwd=many, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == TRY_AGAIN
        assert (many / "tries").read_text() == "xx"

    def test_one_that_takes_too_long_is_ended(self, many):
        command = self.worker(many, "time.sleep(600)")
        done = subprocess.run(
            [*command, "--timeout", "20"],
            cwd=many,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == TRY_AGAIN
        (failed,) = record(many)["failed"]
        assert failed["message"] == "took longer than 20 s"
        assert record(many)["cities"] == {"done": 9, "failed": 1}

    def test_they_end_with_their_parent(self, many):
        process = start(self.worker(many, "time.sleep(600)"), many)
        wait_for((many / "tries").exists, "the slow city")
        workers = children(process.pid)
        assert workers
        process.kill()
        process.communicate()
        wait_for(lambda: not any(map(alive, workers)), "the workers' end")


def test_one_city_that_takes_too_long(desk):
    code = "import time; from topt_deploy.runtime import predict_city as c\nc._key = lambda *_: time.sleep(600)\n"
    code += "from topt_deploy.runtime.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "predict", "regions.parquet", "--timeout", "1", "--metrics-file", "x.prom"],
        cwd=desk.folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.returncode == metric(desk.folder) == TRY_AGAIN
    assert "took longer than 1 s" in done.stderr
    assert not desk.out.exists()


def test_a_folder_that_forges_lines(many):
    """Of a terminal, by escapes in its name."""
    spoil(many / "many" / "city=c3")
    (many / "many" / "city=c3").rename(many / "many" / "city=x\x1b[2K\rall is well")
    said = shell(BATCH, many)
    assert said.code == PARTIAL
    assert "\x1b" not in said.err + said.out
    assert "\r" not in said.err
