"""No damage to a file of a checkpoint goes unseen, whoever looks: restoring, retention, `nextllm verify`."""

import json
import pwd
import random
import re
import shutil

import jax
import numpy as np
import pytest

from nextllm_jax.checkpoint import leaves, step_files
from nextllm_jax.checkpoint.leaves import PLACEHOLDER
from nextllm_jax.checkpoint.manager import Checkpoints
from nextllm_jax.checkpoint.manifest import FORMAT, MANIFEST, DamagedFile, read_manifest, with_checksum
from nextllm_jax.checkpoint.saved_steps import DamagedCheckpoint
from nextllm_jax.checkpoint.verify import check_steps, find_steps
from nextllm_jax.cli.main import verify_command
from nextllm_jax.config import CheckpointConfig, Config
from nextllm_jax.errors import InputError, RunFailed
from tests.checkpoint.tree import abstract, names, save, tree

ITEMS = ("params", "rest")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(directory, run={"tokenizer": "t", "data": "d"}) as checkpoints:
        for step in (1, 2):
            items = {"params": tree(float(step)), "rest": {"count": jax.numpy.int32(step)}}
            checkpoints.save(step, items, {"at": step}, validation_loss=float(step))
    return directory


@pytest.fixture
def directory(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def flip(path):
    content = bytearray(path.read_bytes())
    position = random.Random(str(path.name)).randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


def restore(directory, step, *items):
    checkpoints = Checkpoints(directory)
    targets = {"params": abstract(tree()), "rest": abstract({"count": jax.numpy.int32(0)})}
    return {item: checkpoints.restore(step, item, targets[item]) for item in items}


def reports(path):
    return {report.path.name: (report.state, [damage.file for damage in report.damages]) for report in check(path)}


def check(path):
    return list(check_steps(find_steps(path)))


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_the_manifest_says_what_there_is(directory):
    manifest = read_manifest(step_files.epath.Path(directory / "2"))
    there = {path.relative_to(directory / "2").as_posix(): path.stat().st_size for path in files_of(directory / "2")}
    del there["manifest.json"]
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == there
    assert {"params/manifest.ocdbt", "params/_METADATA", "_CHECKPOINT_METADATA"} < there.keys()
    assert {name.partition("/")[0] for name in there if "/" in name} == set(ITEMS)
    assert (manifest["step"], manifest["run"]) == (2, {"tokenizer": "t", "data": "d"})
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["versions"].keys() >= {"python", "flax", "orbax-checkpoint"}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_found_and_named(directory, how):
    step = directory / "1"
    kinds = set()
    for path in files_of(step):
        name = path.relative_to(step).as_posix()
        kinds.add(name.partition("/")[2] or name)
        content = path.read_bytes()
        DAMAGES[how](path)
        items = [name.partition("/")[0]] if "/" in name else ITEMS
        for item in items:
            with pytest.raises(DamagedCheckpoint) as caught:
                restore(directory, 1, item)
            assert caught.value.step == 1
            sentence = str(caught.value)
            assert sentence.startswith(f"checkpoint {step} is damaged ({name} "), sentence
            assert sentence.endswith("; use another step: 2")
        assert reports(directory) == {"1": ("damaged", [name]), "2": ("ok", [])}
        path.write_bytes(content)
        restore(directory, 1, *items)
    assert {"manifest.json", "_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA"} < kinds


def test_files_that_were_not_saved_do_no_harm_and_are_reported(directory):
    """A file browser's, an editor's, in every directory of a step; and next to the steps."""
    step, expected = directory / "1", []
    for place in [step, *(path for path in step.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "_METADATA~", "copy.zarray"):
            (place / name).write_bytes(b"\0")
        (place / "notes").mkdir()
        (place / "notes" / "7").write_text("")
        expected += [place / name for name in (".DS_Store", "_METADATA~", "copy.zarray", "notes/")]
    for name in (".DS_Store", "3~", "4"):
        (directory / name).write_text("")
    for name in ("2 copy", "1.bak", "5"):
        (directory / name).mkdir()
        (directory / name / ".DS_Store").write_text("")
    shutil.copytree(directory / "2", directory / "2.bak")
    checkpoints = Checkpoints(directory)
    assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 2], 1)
    restored = restore(directory, 1, *ITEMS)
    np.testing.assert_array_equal(restored["params"]["layers"]["kernel"], np.full((8, 4), 1.0))
    one, two = check(directory)
    names = sorted(str(path.relative_to(step)) + "/" * (path.name == "notes") for path in expected)
    assert (one.state, one.failed, one.to_json()["unknown"]) == ("ok", False, names)
    assert str(one).endswith(f"; ignored files that were not saved with it: {', '.join(names)}")
    assert (two.state, two.to_json()["unknown"]) == ("ok", [])
    assert "ignored" not in str(two)


@pytest.mark.parametrize("gone", ["params", "params/d", "params/ocdbt.process_0"])
def test_a_directory_that_is_gone_is_damage(directory, gone):
    shutil.rmtree(directory / "1" / gone)
    with pytest.raises(DamagedCheckpoint, match=rf"/1 is damaged \({gone}/\S+ is missing\); use another step: 2$"):
        restore(directory, 1, "params")
    state, files = reports(directory)["1"]
    assert state == "damaged"
    assert all(file.startswith(gone) for file in files)


def test_no_byte_of_a_manifest_can_change(directory):
    path = directory / "1" / "manifest.json"
    content = path.read_bytes()
    for position in range(0, len(content), 5):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(DamagedFile):
            read_manifest(step_files.epath.Path(directory / "1"))
    path.write_bytes(content.replace(b'"validation_loss": 1.0', b'"validation_loss": 0.1'))
    with pytest.raises(DamagedCheckpoint, match=r"\(manifest.json does not match its checksum\)"):
        Checkpoints(directory).record(1)


def rewrite_manifest(step, change):
    """Change a manifest as another version might have written it, with the checksum of its own."""
    path = step_files.epath.Path(step)
    manifest = read_manifest(path)
    (path / MANIFEST).write_bytes(with_checksum(change(manifest)))


def without(*names):
    return lambda manifest: json.dumps({name: value for name, value in manifest.items() if name not in names}).encode()


def with_values(**values):
    return lambda manifest: json.dumps({**manifest, **values}).encode()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("items", "record"), "lacks items and record"),
        (without("validation_loss"), "lacks validation_loss"),
        (without("files"), "lacks files"),
        (with_values(items=["params"]), "has invalid values in items"),
        (with_values(items={"params": {"norm": ["float32", 3]}}), "has invalid values in items"),
        (with_values(record=None, validation_loss="1.0"), "has invalid values in validation_loss and record"),
        (with_values(validation_loss=float("nan")), "has invalid values in validation_loss"),
        (with_values(files={"a": {"size": "1"}}), "has invalid values in files"),
        (with_values(checksums={"params": [1]}), "has invalid values in checksums"),
        (with_values(format=3), "has format 3, but this version reads formats up to 2"),
        (with_values(format="new"), "has format new, but this version reads formats up to 2"),
        (lambda _: b"[1]", "is not a JSON object"),
        (lambda _: b"manifest", "is not JSON"),
        (lambda _: b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_manifest_of_another_version_is_a_sentence(directory, change, problem, messages):
    rewrite_manifest(directory / "2", change)
    checkpoints = Checkpoints(directory)
    found = rf"/2 cannot be read \(manifest.json {problem}; another version may have written it( \(it was written with "
    found += r"python \S+, .*jax .*\))?\); use another step: 1$"
    uses = (
        lambda: restore(directory, 2, "params"),
        lambda: checkpoints.record(2),
        lambda: checkpoints.validation_loss(2),
        lambda: checkpoints.resolve("best"),
    )
    for use in uses:
        with pytest.raises(InputError, match=found) as caught:
            use()
        assert not isinstance(caught.value, DamagedCheckpoint)  # training must not set it aside
    assert checkpoints.best_step() == 1
    assert re.match(rf"checkpoint \S+/2 cannot be read \(manifest.json {problem};", messages.messages[0])
    one, two = check(directory)
    assert (one.state, two.state, two.failed) == ("ok", "unreadable", True)
    assert str(two).startswith(f"{directory / '2'}: unreadable: manifest.json {problem}; another version may have")
    assert two.to_json()["damaged"][0]["file"] == "manifest.json"
    restore(directory, 1, *ITEMS)


def test_a_manifest_without_a_format_has_the_first(directory):
    manifest = read_manifest(step_files.epath.Path(directory / "2"))
    assert manifest["format"] == FORMAT
    rewrite_manifest(directory / "2", without("format", "run", "versions"))
    restore(directory, 2, *ITEMS)
    assert reports(directory) == {"1": ("ok", []), "2": ("ok", [])}


def test_files_of_an_owner_without_a_name(directory, monkeypatch):
    """In a container the user may have a number alone."""
    monkeypatch.setattr(pwd, "getpwuid", lambda number: (_ for _ in ()).throw(KeyError(number)))
    restore(directory, 2, *ITEMS)
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 3, 3.0)


def test_a_damaged_best_neither_ends_a_run_nor_is_deleted(directory, messages):
    """The best is not the latest, so nobody restores it: retention meets it first."""
    flip(directory / "1" / "manifest.json")
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 3, 3.0)
        save(checkpoints, 4, 4.0)
        checkpoints.add_validation_loss(4, 5.0, {})
        assert checkpoints.best_step() == 2
    assert names(directory) == ["1", "2", "4"]  # what step 1 is worth is unknown, so it stays
    (warning,) = messages.messages
    assert warning.startswith(
        f"checkpoint {directory / '1'} is damaged (manifest.json does not match its checksum); use another"
    )


def test_the_best_is_not_guessed(directory):
    flip(directory / "1" / "manifest.json")
    with pytest.raises(DamagedCheckpoint, match=r"/1 is damaged \(manifest.json .*; use another step: 2$"):
        Checkpoints(directory).resolve("best")
    assert Checkpoints(directory).resolve("latest") == 2


def test_set_aside(directory):
    flip(directory / "2" / "params" / "_METADATA")
    checkpoints = Checkpoints(directory)
    assert checkpoints.latest_step() == 2
    checkpoints.set_aside(2)
    assert checkpoints.steps() == [1]
    assert checkpoints.best_step() == checkpoints.latest_step() == 1
    assert reports(directory) == {"1": ("ok", []), "2.damaged": ("set aside", [])}
    np.testing.assert_array_equal(restore(directory, 1, "params")["params"]["layers"]["kernel"], np.full((8, 4), 1.0))


def test_files_that_are_wrong_on_disk_are_not_saved(tmp_path, monkeypatch):
    """What was hashed is read back before the step counts, and before an older one goes."""
    seal = step_files.seal

    def seal_and_damage(path, content):
        seal(path, content)
        flip(path / "params" / "manifest.ocdbt")

    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        monkeypatch.setattr(step_files, "seal", seal_and_damage)
        with pytest.raises(
            RunFailed,
            match=r"step 2 could not be saved in .* \(params/manifest.ocdbt is not .*checkpoint is step 1",
        ):
            save(checkpoints, 2)
        monkeypatch.undo()
        assert names(tmp_path) == ["1"]
        restore(tmp_path, 1, "params")
        save(checkpoints, 2)
    assert names(tmp_path) == ["2"]


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/1"])
def test_verify_takes_a_run_its_checkpoints_or_a_step(directory, below):
    expected = {"1": ("ok", [])} if below.endswith("1") else {"1": ("ok", []), "2": ("ok", [])}
    assert reports(directory.parent / below) == expected


def test_verify_marks_what_retention_keeps(directory, messages, capsys):
    """The earlier of the two has the lower loss."""
    (directory / "1" / "pinned").touch()
    (directory.parent / "config.json").write_text(Config(checkpoint=CheckpointConfig(keep_last=3)).to_json())
    assert verify_command([str(directory.parent)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith(" (best, pinned)")
    assert second.endswith(" (latest)")
    assert "the latest (checkpoint.keep_last 3) and pinned ones, and deletes the others" in messages.text
    assert "--checkpoint.keep-every-steps keeps milestones" in messages.text
    assert verify_command([str(directory / "2"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["marks"] == ["latest"]


def test_verify_tells_leftovers_from_checkpoints(directory):
    (directory / "3.unfinished").mkdir()
    (directory / "4.unfinished.orbax-checkpoint-tmp").mkdir()
    (directory / "5.deleted").mkdir()
    (directory / "notes").mkdir()
    whole = ("ok", [])
    unfinished = dict.fromkeys(["3.unfinished", "4.unfinished.orbax-checkpoint-tmp", "5.deleted"], ("unfinished", []))
    assert reports(directory) == {"1": whole, "2": whole, **unfinished}


def test_verify_refuses_what_is_no_run(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "5").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "notes", tmp_path):
        with pytest.raises(InputError, match=r"is not a run; give a run directory"):
            find_steps(path)
    (tmp_path / "config.json").write_text("{}")
    assert find_steps(tmp_path) == []


def test_verify_says_nothing_of_a_step_that_goes_meanwhile(directory):
    paths = find_steps(directory)
    shutil.rmtree(directory / "1")
    assert [report.path.name for report in check_steps(paths)] == ["2"]


def test_verify_reports_progress_in_bytes(directory):
    read = []
    assert [report.state for report in check_steps(find_steps(directory), read.append)] == ["ok", "ok"]
    files = [path for step in ("1", "2") for path in files_of(directory / step) if path.name != "manifest.json"]
    assert sum(read) == sum(path.stat().st_size for path in files)


@pytest.fixture
def large(tmp_path):
    """Two steps with arrays so large that restoring does not read their files first."""
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        for step in (1, 2):
            noise = jax.random.normal(jax.random.key(step), (2, 300_000))
            checkpoints.save(step, {"params": {"a": {"b": noise}, "c": noise[0]}}, {}, validation_loss=None)
    return tmp_path


LARGE = abstract({"a": {"b": np.zeros((2, 300_000), np.float32)}, "c": np.zeros(300_000, np.float32)})


def restore_large(directory, step, part=LARGE):
    (restored,) = Checkpoints(directory).restore_parts(step, "params", LARGE, [part])
    return restored


def test_a_flipped_bit_in_an_array_is_found_without_reading_its_file_twice(large, monkeypatch):
    read = []
    checksum = step_files._checksum
    monkeypatch.setattr(step_files, "_checksum", lambda *all: (read.append(all[1]), checksum(*all))[1])
    restore_large(large, 2)
    sizes = {path.relative_to(large / "2").as_posix(): path.stat().st_size for path in files_of(large / "2")}
    assert sum(sizes.values()) > 3_000_000
    assert 0 < sum(sizes[name] for name in read) < 100_000
    path = max(files_of(large / "2" / "params"), key=lambda path: path.stat().st_size)
    name = path.relative_to(large / "2").as_posix()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    damaged = re.escape(f"/2 is damaged ({name} is not what was saved (its sha256 differs)")
    with pytest.raises(DamagedCheckpoint, match=rf"{damaged}(; array (a/b|c) differs)?\); use another step: 1$"):
        restore_large(large, 2)
    restore_large(large, 1)


def test_an_array_that_was_altered_before_it_was_hashed_is_damage(large):
    """As by a fault in the memory of the host: the files are what was written. Other arrays can be restored."""
    rewrite_manifest(large / "2", lambda manifest: json.dumps(with_other_checksum(manifest)).encode())
    assert reports(large)["2"] == ("ok", [])
    with pytest.raises(
        DamagedCheckpoint, match=r"/2 is damaged \(params a/b is not what was saved, although the files"
    ):
        restore_large(large, 2)
    with pytest.raises(DamagedCheckpoint, match=r"\(params a/b is not"):
        restore_large(large, 2, LARGE | {"c": PLACEHOLDER})
    assert restore_large(large, 2, LARGE | {"a": {"b": PLACEHOLDER}})["c"].shape == (300_000,)


def with_other_checksum(manifest):
    checksums = manifest["checksums"]["params"]
    return manifest | {"checksums": {"params": checksums | {"a/b": checksums["a/b"] ^ 1}}}


def test_an_array_that_was_altered_on_the_way_is_read_again(large, monkeypatch, messages):
    read, altered = leaves.read, []

    def alter_once(*arguments):
        tree = read(*arguments)
        if not altered:
            altered.append(tree["c"])
            tree["c"] = tree["c"].at[5].multiply(-1)
        return tree

    monkeypatch.setattr(leaves, "read", alter_once)
    np.testing.assert_array_equal(restore_large(large, 2)["c"], altered[0])
    (warning,) = messages.messages
    assert warning == f"{large / '2'}: params c was altered while it was read; reading it again"


def test_a_step_without_checksums_is_read_first(large):
    """As versions before the checksums have saved it."""
    rewrite_manifest(large / "2", without("checksums"))
    restore_large(large, 2)
    path = max(files_of(large / "2" / "params"), key=lambda path: path.stat().st_size)
    flip(path)
    name = path.relative_to(large / "2").as_posix()
    with pytest.raises(DamagedCheckpoint, match=re.escape(f"({name} is not what was saved (its sha256 differs))")):
        restore_large(large, 2)


def test_checksums_do_not_depend_on_the_mesh(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    noise = jax.random.normal(jax.random.key(0), (16, 32))
    specs = [None, jax.P("fsdp", "data"), jax.P(None, ("data", "fsdp")), jax.P()]
    shardings = [jax.sharding.NamedSharding(mesh, spec) if spec is not None else noise.sharding for spec in specs]
    with Checkpoints(tmp_path, keep_last=4) as checkpoints:
        for step, sharding in enumerate(shardings):
            checkpoints.save(step, {"params": {"x": jax.device_put(noise, sharding)}}, {}, validation_loss=None)
    found = [read_manifest(step_files.epath.Path(tmp_path / str(step)))["checksums"] for step in range(4)]
    assert found == [found[0]] * 4
    for step in range(4):
        Checkpoints(tmp_path).restore(step, "params", abstract({"x": noise}, shardings[step - 1]))
