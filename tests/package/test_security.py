"""What the package never does with data: evaluate it, unpickle it, hand it to a shell, follow it elsewhere, download for it."""

import ast
import gzip
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from pydit import FormatError, UserError, files, prune, weights
from pydit.cli import main
from pydit.data import CachedDataset, Sample, Skipped, read_samples, samples
from pydit.demo.teacher import ASSETS
from pydit.distill import checkpoint
from pydit.inference.checks import check_pipeline
from pydit.inference.pipeline import load_pipeline, save_pipeline
from pydit.plan import PruningPlan
from tests.data.test_data import picture
from tests.demo.pipelines import untrained
from tests.fuzz import harness

ROOT = Path(__file__).resolve().parents[2]
if sys.version_info >= (3, 11):
    import tomllib


def calls(tree):
    """(dotted name, call) of every call of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def forbidden(source):
    """What a module does that it must not, as a list of words with lines."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: import of {name}" for name in names
                  if name.split(".")[0] in {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}]
    for name, call in calls(tree):
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        last = name.rpartition(".")[2]
        if name in {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "subprocess.getoutput",
                    "subprocess.getstatusoutput"} or name.startswith(("os.exec", "os.spawn", "os.posix_spawn")) or \
                last in {"extractall", "urlopen", "urlretrieve", "hf_hub_download", "snapshot_download"}:
            found.append(f"{call.lineno}: {name}")
        if name in {"torch.load", "np.load", "numpy.load", "yaml.load"}:
            safe = options.get("weights_only") if name == "torch.load" else options.get("allow_pickle", ast.Constant(False))
            if not isinstance(safe, ast.Constant) or safe.value is not (name == "torch.load"):
                found.append(f"{call.lineno}: {name}")
        if "shell" in options and not (isinstance(options["shell"], ast.Constant) and options["shell"].value is False):
            found.append(f"{call.lineno}: {name} with a shell")
        if last == "from_pretrained" and "local_files_only" not in options and not name.startswith("super()"):
            found.append(f"{call.lineno}: {name} without local_files_only")
    return found


def test_the_search_finds_what_it_looks_for():
    wrong = ("eval(x)", "exec(x)", "import pickle", "from pickle import loads", "torch.load(x)", "torch.load(x, weights_only=y)",
             "subprocess.run(x, shell=True)", "os.system(x)", "import yaml", "np.load(x, allow_pickle=True)", "tar.extractall()",
             "Model.from_pretrained(x)", "huggingface_hub.hf_hub_download(x)",
             "os.execvp(x, y)", "os.spawnl(x)", "subprocess.getoutput(x)")
    assert [source for source in wrong if not forbidden(source)] == []
    assert not forbidden("model.eval()\ntorch.load(x, weights_only=True)\nre.compile(x)\nsubprocess.run(x, shell=False)")


def test_no_module_evaluates_unpickles_or_downloads():
    wrong = {str(path.relative_to(ROOT)): found for folder in ("pydit", "benchmarks", "build_tools")
             for path in (ROOT / folder).rglob("*.py") if (found := forbidden(path.read_text()))}
    assert not wrong


GUARD = """
import os, socket
def refuse(*args, **options):
    os._exit(99)
socket.create_connection = socket.getaddrinfo = refuse
class Blocked(socket.socket):
    connect = connect_ex = refuse
socket.socket = Blocked
"""
PARTS = "import pydit.cli.model, pydit.ops, pydit.stats, pydit.analysis, pydit.distill, pydit.data, pydit.inference.pipeline"


@pytest.mark.parametrize(("code", "ends"), [(PARTS, 0), ("import http.client as h; h.HTTPConnection('localhost').connect()", 99)],
                         ids=["import", "what the guard is for"])
def test_an_import_opens_no_connection(code, ends):
    assert subprocess.run([sys.executable, "-c", GUARD + code], cwd=ROOT, check=False).returncode == ends


@pytest.fixture
def connections(monkeypatch):
    """Connections that something tried to open; the hub's own offline switch is off."""
    import huggingface_hub.constants

    opened = []

    def refuse(*args, **_options):
        opened.append(args)
        raise OSError("no network in this test")

    for owner, name in ((socket, "create_connection"), (socket, "getaddrinfo"), (socket.socket, "connect"),
                        (socket.socket, "connect_ex")):
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return opened


HUB = "Qwen/Qwen-Image"
COMMANDS = [["demo", "--teacher", HUB], ["analyze", HUB, "--prompts", "demo", "--out", "x"],
            ["plan", "--search", HUB, "--prompts", "demo"], ["plan", "Qwen/stats.safetensors"],
            ["prune", HUB, "--plan", "plan.json", "--out", "x"],
            ["prune", HUB, "--plan", "plan.json", "--out", "x", "--init", "probe", "--prompts", "demo"],
            ["distill", HUB, "Qwen/Other", "--prompts", "demo", "--out", "x"], ["generate", HUB, "a ring", "--out", "x"],
            ["eval", HUB], ["generate", "broken", "a ring", "--out", "x"], ["bench", "--path", "nowhere"]]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv[:2]))
def test_no_command_downloads(tmp_path, monkeypatch, capfd, connections, argv):
    """Names of models on the hub, and a pipeline without its tokenizer's files: an error, without a look at the network."""
    monkeypatch.chdir(tmp_path)
    PruningPlan.from_intervals(6, [(1, 2)]).save(tmp_path / "plan.json")
    (tmp_path / "broken" / "tokenizer").mkdir(parents=True)
    files.write_json(tmp_path / "broken" / "model_index.json", {
        "_class_name": "QwenImagePipeline", "_name_or_path": HUB, "tokenizer": ["transformers", "Qwen2Tokenizer"]})
    assert main(argv) == 2 and "expected" in capfd.readouterr().err
    assert connections == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "plan.json"]


def test_a_shard_whose_members_lead_elsewhere(tmp_path):
    """Nothing of a tar file is written anywhere, and no link is followed."""
    (tmp_path / "secret.txt").write_text("a secret")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, data, kind, target in (
                ("../a.png", picture(0), tarfile.REGTYPE, ""), ("/tmp/b.png", picture(1), tarfile.REGTYPE, ""),
                ("c/../../d.png", picture(1), tarfile.REGTYPE, ""), ("e.png", picture(2), tarfile.REGTYPE, ""),
                ("e.txt", b"", tarfile.SYMTYPE, str(tmp_path / "secret.txt")), ("f.txt", b"", tarfile.LNKTYPE, "../secret.txt"),
                ("g.png", picture(3), tarfile.REGTYPE, ""), ("g.txt", b"a picture", tarfile.REGTYPE, "")):
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, target
            tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.iterdir())
    found = list(read_samples(tmp_path / "s.tar"))
    assert [sample.key for sample in found if isinstance(sample, Sample)] == ["s.tar:g"]
    reasons = {sample.key: sample.reason for sample in found if isinstance(sample, Skipped)}
    assert [reasons[f"s.tar:{name}"] for name in ("../a.png", "/tmp/b.png", "c/../../d.png", "e.txt", "f.txt", "e")] == [
        *["its name leads out of the shard"] * 3, "a link", "a link", "no caption"]
    assert sorted(tmp_path.iterdir()) == before


def test_a_pipe_among_the_shards(tmp_path):
    """Opened, it would be waited for without end."""
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").mkdir()
    with harness.bounded():
        assert list(read_samples(tmp_path)) == [Skipped("a.tar", "not a file"), Skipped("b.tar", "not a file")]


def test_an_output_takes_no_place_of_a_pipe(tmp_path):
    """A rename would: of /dev/null too, for who may write in /dev."""
    os.mkfifo(tmp_path / "out.json")
    with pytest.raises(UserError, match=r"out: expected a file or a new path, got a device or a pipe \(.*out.json\)"):
        files.write_json(tmp_path / "out.json", {})
    assert (tmp_path / "out.json").is_fifo() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("name", "argv"), [
    ("x.json", ["plan", "--show", "x.json"]), ("x.safetensors", ["plan", "x.safetensors"]),
    ("x.txt", ["generate", str(ASSETS), "--prompts-file", "x.txt", "--out", "images"])], ids=lambda value: str(value)[:6])
def test_a_file_that_announces_more_than_there_is_memory(tmp_path, monkeypatch, name, argv):
    """A terabyte of nothing; of safetensors, with a header of as much."""
    monkeypatch.chdir(tmp_path)
    with open(name, "wb") as file:
        file.write((10**12 - 8).to_bytes(8, "little") if name == "x.safetensors" else b"")
        file.truncate(10**12)
    code, _, err = harness.command(*argv)
    assert code == 2 and re.search(r"expected .*(of at most 1073741824 bytes, got 1000000000000|more than 100000000)", err), err


def test_an_error_does_not_command_the_terminal(tmp_path, capsys):
    """What a file says is shown, not obeyed: here through a message of diffusers."""
    shutil.copytree(untrained(), tmp_path / "p")
    index = files.read_json(tmp_path / "p" / "model_index.json", what="x")
    files.write_json(tmp_path / "p" / "model_index.json", index | {"scheduler": ["diffusers", "X\x1b[2J\x1b]0;owned\x07"]})
    assert main(["generate", str(tmp_path / "p"), "a ring", "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.isprintable() and r"X\x1b[2J" in last, last


def test_a_sparse_member_is_not_unfolded(tmp_path):
    """A terabyte of zeros in a tar file of a few kilobytes."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        member, data = tarfile.TarInfo("a.png"), b"1\n0\n4\n".ljust(512, b"\0") + b"data"
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12),
                              "GNU.sparse.name": "a.png"}
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    (found,) = read_samples(tmp_path / "s.tar")
    assert "sparse" in found.reason


def _compressed(path, header, block, count):
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(header)
        for _ in range(count):
            file.write(block)


def _header(name="a.png", kind=tarfile.REGTYPE, size=0, **pax):
    member = tarfile.TarInfo(name)
    member.type, member.size, member.pax_headers = kind, size, pax
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "4", "GNU.sparse.name": "a.png"}


@pytest.mark.parametrize(("header", "block", "reason"), [
    (_header(kind=tarfile.GNUTYPE_LONGNAME, size=1 << 28), bytes(1 << 20), "a header of more than 1 MiB"),
    (_header(kind=tarfile.XHDTYPE, size=1 << 28), bytes(1 << 20), "a header of more than 1 MiB"),
    (_header(size=1 << 28, **SPARSE) + b"1000000000\n", b"0\n" * (1 << 19), "a header of more than 1 MiB"),
    (_header("a.txt", size=1 << 28), bytes(1 << 20), "more than 1 MiB"),
    (_header("a.x", size=1 << 28), bytes(1 << 20), "no image among .x"),
], ids=["long name", "attributes", "sparse map", "caption", "another file"])
def test_a_shard_that_unpacks_to_a_thousand_times_its_size(tmp_path, header, block, reason):
    """A member or its header of 256 MiB in a shard of one: it is not taken into memory."""
    _compressed(tmp_path / "s.tar", header, block, (1 << 28) // len(block))
    assert (tmp_path / "s.tar").stat().st_size < 2 << 20
    with harness.bounded(1 << 26):
        (found,) = read_samples(tmp_path / "s.tar")
    assert isinstance(found, Skipped) and found.reason.endswith(reason)


def test_a_sample_of_many_images(tmp_path, monkeypatch):
    """What one sample holds is bounded, not only its files; the next sample starts anew."""
    monkeypatch.setattr(samples, "MAX_BYTES", 2 << 20)
    with tarfile.open(tmp_path / "s.tar", "w:gz") as tar:
        for name in ("a.png", "a.jpg", "a.webp", "b.png", "b.txt"):
            data = b"a caption" if name == "b.txt" else bytes(1 << 20)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = list(read_samples(tmp_path / "s.tar"))
    assert found[0] == Skipped("s.tar:a.webp", "a sample of more than 2 MiB") and found[-1].key == "s.tar:b"


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "..", "", "a/b.safetensors", 3, None, ["x"]])
def test_a_file_that_names_files_elsewhere(tmp_path, name):
    """An index of shards, of a cache, of a checkpoint: what lies beside it is read, and nothing else."""
    (tmp_path / "p" / "transformer").mkdir(parents=True)
    index = tmp_path / "p" / "transformer" / "w.safetensors.index.json"
    files.write_json(index, {"weight_map": {"a": name}})
    files.write_json(tmp_path / "p" / "model_index.json", {"transformer": ["diffusers", "X"]})
    readers = [lambda: weights.SafetensorsReader(index.parent, "w", what="pipeline"), lambda: check_pipeline(tmp_path / "p")]
    files.write_json(tmp_path / "index.json", {
        "format": "pydit-cached-dataset", "version": 1, "read": 1, "complete": True, "shards": [name], "skipped": [],
        "made_of": {"source": "x", "resolution": 48, "shard_size": 1, "latent_channels": 4, "text_channels": 4},
        "samples": [{"key": "a", "height": 1, "width": 1}]})
    readers.append(lambda: CachedDataset(tmp_path))
    files.write_json(tmp_path / checkpoint.INDEX, {
        "format": checkpoint.FORMAT, "version": checkpoint.VERSION, "progress": {}, "run": {}, "tensors": name})
    readers.append(lambda: checkpoint.load(tmp_path, {}, {}))
    for read in readers:
        with pytest.raises(FormatError, match="expected a file name beside"):
            read()


@pytest.mark.parametrize("entry", [
    {"attn_implementation": "kernels-community/flash-attn"}, {"_attn_implementation": "flash_attention_2"},
    {"text_config": {"_attn_implementation_internal": "a/b"}}, {"attn_implementation": {"": "sdpa", "text_config": "a/b"}}],
    ids=str)
def test_a_configuration_that_names_attention_on_the_hub(tmp_path, entry):
    """transformers would fetch it and run it, once the package `kernels` is there."""
    files.write_json(tmp_path / "model_index.json", {"text_encoder": ["transformers", "X"]})
    (tmp_path / "text_encoder").mkdir()
    files.write_json(tmp_path / "text_encoder" / "config.json", {"_attn_implementation": "sdpa"})
    check_pipeline(tmp_path)
    files.write_json(tmp_path / "text_encoder" / "config.json", entry)
    with pytest.raises(FormatError, match="expected attention of the library itself in .*config.json, got '"):
        check_pipeline(tmp_path)


def test_a_configuration_that_names_experts_on_the_hub(tmp_path):
    files.write_json(tmp_path / "model_index.json", {"text_encoder": ["transformers", "X"]})
    (tmp_path / "text_encoder").mkdir()
    files.write_json(tmp_path / "text_encoder" / "config.json", {"experts_implementation": "grouped_mm"})
    check_pipeline(tmp_path)
    files.write_json(tmp_path / "text_encoder" / "config.json", {"text_config": {"_experts_implementation": "sonicmoe"}})
    with pytest.raises(FormatError, match="config.json, got 'sonicmoe', which may be fetched from the hub"):
        check_pipeline(tmp_path)


@pytest.mark.parametrize("entry", [
    {"quant_method": "mxfp4"}, {"quant_method": "fp8"}, {"quant_method": "nunchaku_lite"}, {"quant_method": "gguf"},
    {"quant_method": None}, {}, 5, ["x"]], ids=str)
def test_a_configuration_whose_quantization_takes_kernels_from_the_hub(tmp_path, entry):
    """Both libraries would fetch them when such weights are loaded, whatever local_files_only says, and run them."""
    files.write_json(tmp_path / "model_index.json", {"text_encoder": ["transformers", "X"]})
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "config.json"
    for known in (None, {"quant_method": "bitsandbytes_4bit"}, {"load_in_8bit": True}, {"quant_method": "torchao"}):
        files.write_json(file, {"quantization_config": known})
        check_pipeline(tmp_path)
    for config in ({"quantization_config": entry}, {"text_config": {"quantization_config": entry}}):
        files.write_json(file, config)
        with pytest.raises(FormatError, match="expected weights that are not quantized, or by one of .*config.json, got .* hub"):
            check_pipeline(tmp_path)


def test_a_component_elsewhere(tmp_path):
    (tmp_path / "p").mkdir()
    files.write_json(tmp_path / "p" / "model_index.json", {"../x": ["diffusers", "X"]})
    with pytest.raises(FormatError, match="expected a file name beside .*model_index.json, got '../x'"):
        check_pipeline(tmp_path / "p")


MARK = "the code of a pipeline ran"


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A pipeline in the current directory, a module that marks its import there and in every part, and where that goes."""
    shutil.copytree(untrained(), tmp_path / "p")
    for folder in (tmp_path / "p", *(path for path in (tmp_path / "p").iterdir() if path.is_dir())):
        (folder / "marking.py").write_text(f"open({str(tmp_path / MARK)!r}, 'w')\nclass X: pass\n")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.syspath_prepend(tmp_path / "p")
    yield tmp_path / "p"
    assert not (tmp_path / MARK).exists() and "marking" not in sys.modules


@pytest.mark.parametrize(("entry", "message"), [
    ({"_class_name": ["marking", "X"]}, "expected the name of a class as _class_name in .*, got .'marking', 'X'."),
    ({"scheduler": ["marking", "X"]}, "expected scheduler of diffusers, transformers or pydit in .*, got one of 'marking'"),
    ({"scheduler": ["os.path", "join"]}, "expected scheduler of .*, got one of 'os.path'"),
    ({"scheduler": [7, "join"]}, "expected scheduler of .*, got one of '7'")], ids=str)
def test_a_pipeline_that_brings_code(with_code, entry, message):
    """diffusers 0.39 imports any module that an index names."""
    index = files.read_json(with_code / "model_index.json", what="x")
    files.write_json(with_code / "model_index.json", index | entry)
    with pytest.raises(FormatError, match=message):
        load_pipeline(with_code)


def test_the_file_beside_a_thinned_transformer_is_not_run(tmp_path):
    """It is for diffusers alone: here the class is at hand."""
    pipe = load_pipeline(untrained())
    with pytest.warns(UserWarning, match="start as the identity"):
        pipe.register_modules(transformer=prune(pipe.transformer, PruningPlan("qwen-image", 6, linear_ffn=[1])))
    save_pipeline(pipe, tmp_path / "p", remote_code=True)
    (file,) = (tmp_path / "p").rglob("*.py")
    file.write_text(f"open({str(tmp_path / MARK)!r}, 'w')\n")
    assert type(load_pipeline(tmp_path / "p").transformer) is type(pipe.transformer)
    assert not (tmp_path / MARK).exists()


def test_an_adapter_that_names_a_model_elsewhere(tmp_path):
    """transformers would load that one in the place of what lies here."""
    shutil.copytree(untrained(), tmp_path / "p")
    files.write_json(tmp_path / "p" / "text_encoder" / "adapter_config.json", {
        "peft_type": "LORA", "base_model_name_or_path": "/etc", "target_modules": ["q_proj"]})
    with pytest.raises(FormatError, match="expected the weights of text_encoder in .*, got an adapter of another model"):
        load_pipeline(tmp_path / "p")


@pytest.mark.parametrize(("component", "entry"), [
    ("transformer", {"num_layers": 10**7}), ("text_encoder", {"text_config": {"num_hidden_layers": 10**7}}),
    ("vae", {"num_res_blocks": 10**7})], ids=str)
def test_a_configuration_of_more_layers_than_there_are_tensors(tmp_path, component, entry):
    """Making them takes memory and time without end before the first tensor is missed."""
    shutil.copytree(untrained(), tmp_path / "p")
    file = tmp_path / "p" / component / "config.json"
    files.write_json(file, files.read_json(file, what="x") | entry)
    with harness.bounded(), pytest.raises(FormatError, match=r"expected at most 1024 as \w+ in .*, beside \d+ tensors, got 10000000"):
        load_pipeline(tmp_path / "p")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_dependencies_have_upper_bounds_only_where_a_break_is_known():
    """A bound keeps a user from a fix: each one must be listed here, with what breaks above it."""
    known_breaks: dict[str, str] = {}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = [data["project"]["dependencies"], data["build-system"]["requires"],
              *data["project"]["optional-dependencies"].values()]
    for requirement in (text for group in groups for text in group):
        name, bounds = re.fullmatch(r"([\w.-]+)\s*([^;]*)(?:;.*)?", requirement).groups()
        assert name in known_breaks or not re.search(r"<|==|~=|!=", bounds), requirement
    for name in ("torch", "diffusers"):  # the lowest that is tried
        assert any(re.match(rf"{name}>=", text) for text in data["project"]["dependencies"])
    assert data["project"]["requires-python"] == ">=3.10"
