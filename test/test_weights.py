"""Weights of other projects: OpenAI's download against a server on loopback, names, sizes."""

import contextlib
import hashlib
import re
import threading
import warnings
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import open_clip
import pytest
import torch

from backbones import loading
from backbones.loading import activation_of_script, find_openai, script, state_dict_in
from backbones.model_configs import model_config_names, model_config_of, read_model_config, sizes_of
from backbones.naming import from_hugging_face, from_open_clip, to_hugging_face
from backbones.towers import CLIP
from test_towers import RESNET, VIT, randomise, shapes

CONTENT = bytes(range(256)) * 2000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@contextlib.contextmanager
def serving(respond):
    """A server on loopback; respond(handler) answers GET and HEAD. Yields (URL, list of paths)."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            asked.append(self.path)
            respond(self)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def answer(handler, content=b"", status=200, **headers):
    """Send a whole answer; a header of None is left out."""
    headers = {"Content_Length": len(content), "Connection": "close", **headers}
    handler.send_response(status)
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)
    handler.close_connection = True


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """models/ and the user's cache, both of their own; CONTENT is the file of every name."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setattr(loading, "OPENAI", dict.fromkeys(loading.OPENAI, DIGEST))
    (tmp_path / "models").mkdir()
    return tmp_path / "models", tmp_path / "home" / ".cache" / "clip"


def refused(folders, respond, name="ViT-B/32"):
    """The message of a download that fails, after which nothing new lies in any folder."""
    before = sorted(folders[1].iterdir()) if folders[1].is_dir() else []
    with serving(respond) as (url, _), pytest.raises(ValueError) as error:
        find_openai(name, folders[0], url)
    after = sorted(folders[1].iterdir()) if folders[1].is_dir() else []
    assert after == before and not list(folders[0].iterdir())
    message = str(error.value)
    for part in (f"{url}/{DIGEST}/ViT-B-32.pt", DIGEST, str(folders[0]), str(folders[1])):
        assert part in message
    return message


# ------------------------------------------------------------------ OpenAI's download


def test_names_files_and_digests_are_those_that_open_clip_knows():
    for name, digest in loading.OPENAI.items():
        known = name.replace("/", "-").replace("@336px", "-336")
        url = open_clip.pretrained.get_pretrained_url(known, "openai")
        assert url.startswith(f"{loading.OPENAI_URL}/{digest}/")


@pytest.mark.parametrize("name", loading.OPENAI)
def test_a_file_is_asked_for_by_its_digest_and_kept(folders, name):
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    with serving(lambda handler: answer(handler, CONTENT)) as (url, asked):
        path = find_openai(name, folders[0], url)
    assert asked == [f"/{DIGEST}/{file}"]
    assert path == folders[1] / file and path.read_bytes() == CONTENT
    assert list(folders[1].iterdir()) == [path]


def test_a_download_shows_its_progress(folders, capsys):
    with serving(lambda handler: answer(handler, CONTENT)) as (url, _):
        find_openai("ViT-B/32", folders[0], url)
    assert re.search(r"ViT-B-32\.pt: 100%.*512k/512k", capsys.readouterr().err)


def test_a_cached_file_is_not_asked_for_again(folders):
    with serving(lambda handler: answer(handler, CONTENT)) as (url, asked):
        first = find_openai("ViT-B/32", folders[0], url)
        assert find_openai("ViT-B/32", folders[0], url) == first
    assert len(asked) == 1


def test_a_broken_file_in_the_cache_is_reported_and_replaced(folders, capsys):
    folders[1].mkdir(parents=True)
    path = folders[1] / "ViT-B-32.pt"
    path.write_bytes(CONTENT[:-1])
    with serving(lambda handler: answer(handler, CONTENT)) as (url, asked):
        assert find_openai("ViT-B/32", folders[0], url) == path
    assert len(asked) == 1 and path.read_bytes() == CONTENT
    [line] = capsys.readouterr().out.splitlines()
    assert str(path) in line and "SHA-256" in line


def test_a_broken_file_in_the_cache_stays_where_no_better_one_comes(folders):
    folders[1].mkdir(parents=True)
    (folders[1] / "ViT-B-32.pt").write_bytes(b"old")
    refused(folders, lambda handler: answer(handler, b"", 503))
    assert (folders[1] / "ViT-B-32.pt").read_bytes() == b"old"


@pytest.mark.parametrize("file", ["ViT-L-14-336px.pt", "ViT-L-14-336.pt"])
def test_a_file_in_models_is_taken_as_it_is(folders, file):
    (folders[0] / file).write_bytes(b"converted")
    with serving(lambda handler: answer(handler, CONTENT)) as (url, asked):
        assert find_openai("ViT-L/14@336px", folders[0], url) == folders[0] / file
    assert not asked


def test_redirects_are_followed(folders):
    def respond(handler):
        if handler.path == "/moved":
            answer(handler, CONTENT)
        else:
            answer(handler, b"", 302, Location="/moved")

    with serving(respond) as (url, asked):
        path = find_openai("ViT-B/32", folders[0], url)
    assert asked == [f"/{DIGEST}/ViT-B-32.pt", "/moved"] and path.read_bytes() == CONTENT


def test_a_server_need_not_tell_the_length(folders):
    with serving(lambda handler: answer(handler, CONTENT, Content_Length=None)) as (url, _):
        assert find_openai("ViT-B/32", folders[0], url).read_bytes() == CONTENT


def test_a_truncated_file_of_unknown_length_is_refused_by_its_digest(folders):
    cut = CONTENT[: len(CONTENT) // 2]
    found = hashlib.sha256(cut).hexdigest()
    message = refused(folders, lambda handler: answer(handler, cut, Content_Length=None))
    assert found in message


def test_a_truncated_file_is_refused(folders):
    cut, whole = CONTENT[: len(CONTENT) // 2], len(CONTENT)
    message = refused(folders, lambda handler: answer(handler, cut, Content_Length=whole))
    assert re.search(f"{len(cut)} .*{whole}|IncompleteRead", message)


def test_a_file_of_another_digest_is_refused(folders):
    other = CONTENT[:-1] + b"!"
    message = refused(folders, lambda handler: answer(handler, other))
    assert hashlib.sha256(other).hexdigest() in message


def test_a_server_that_goes_midway_is_an_error(folders):
    def respond(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"1000\r\n" + bytes(100))  # of 4096 announced
        handler.close_connection = True

    refused(folders, respond)


def test_a_server_that_answers_nothing_is_an_error(folders):
    refused(folders, lambda handler: setattr(handler, "close_connection", True))


@pytest.mark.parametrize("status", [403, 404, 500])
def test_an_http_error_is_named(folders, status):
    assert str(status) in refused(folders, lambda handler: answer(handler, b"", status))


def test_a_server_that_falls_silent_is_an_error(folders, monkeypatch):
    opened, silent = loading.urllib.request.urlopen, threading.Event()
    monkeypatch.setattr(
        loading.urllib.request, "urlopen", lambda url, timeout: opened(url, timeout=0.2)
    )

    def respond(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(bytes(10))
        handler.wfile.flush()
        silent.wait(2)

    assert "timed out" in refused(folders, respond)
    silent.set()


def test_without_network_the_error_says_what_to_do(folders):
    with serving(answer) as (url, _):
        pass  # nobody listens there any more
    with pytest.raises(ValueError, match="refused") as error:
        find_openai("RN50", folders[0], url)
    for part in (f"{url}/{DIGEST}/RN50.pt", DIGEST, str(folders[0]), "RN50.pt into"):
        assert part in str(error.value)
    assert not list(folders[1].iterdir())


def test_an_interrupted_download_leaves_nothing(folders, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading.tqdm, "update", interrupt)
    with serving(lambda handler: answer(handler, CONTENT)) as (url, _):
        with pytest.raises(KeyboardInterrupt):
            find_openai("ViT-B/32", folders[0], url)
    assert not list(folders[1].iterdir())


# ------------------------------------------------------------------ sizes


def test_sizes_are_those_of_each_definition():
    for name in model_config_names():
        model_config = read_model_config(name)
        with torch.device("meta"):
            state = CLIP(model_config).state_dict()
        expected = {key: model_config[key] for key in ("embed_dim", "image_size", "vision", "text")}
        for tower in ("vision", "text"):
            expected[tower] = {k: v for k, v in expected[tower].items() if k != "heads"}
        found = sizes_of(state)
        assert found == expected
        assert [list(found), *map(list, (found["vision"], found["text"]))] == [
            list(expected),
            *map(list, (expected["vision"], expected["text"])),
        ]
        assert model_config_of(state)["vision"] == model_config["vision"]


def test_sizes_name_every_parameter_that_is_missing():
    state = CLIP(VIT).state_dict()
    missing = ("visual.conv1.weight", "token_embedding.weight", "text_projection")
    for name in missing:
        del state[name]
    with pytest.raises(ValueError) as error:
        sizes_of(state)
    assert all(name in str(error.value) for name in missing)


@pytest.mark.parametrize(
    ("model_config", "name"),
    [(VIT, "visual.positional_embedding"), (RESNET, "visual.attnpool.positional_embedding")],
)
def test_sizes_refuse_positions_that_are_no_square(model_config, name):
    state = CLIP(model_config).state_dict()
    state[name] = state[name][:-1]
    with pytest.raises(ValueError, match=name):
        sizes_of(state)


@pytest.mark.parametrize("model_config", [VIT, RESNET], ids=["vit", "resnet"])
def test_sizes_name_a_parameter_of_another_number_of_dimensions(model_config):
    state, resnet = CLIP(model_config).state_dict(), model_config is RESNET
    first = "visual.layer1.0.conv1.weight" if resnet else "visual.conv1.weight"
    positions = f"visual.{'attnpool.' if resnet else ''}positional_embedding"
    others = ("positional_embedding", "token_embedding.weight", "text_projection")
    for name in (first, positions, *others):
        for shape in ((), (3,)):
            with pytest.raises(ValueError, match=f"{name} has the shape .*dimensions"):
                sizes_of({**state, name: torch.zeros(shape)})


def test_sizes_refuse_no_positions_at_all():
    state = {**CLIP(VIT).state_dict(), "visual.positional_embedding": torch.zeros(0, 128)}
    with pytest.raises(ValueError, match="visual.positional_embedding: 0 positions"):
        sizes_of(state)


# ------------------------------------------------------------------ state dicts and archives


@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
@pytest.mark.parametrize("under", [False, True])
def test_a_state_dict_is_found_bare_or_under_its_name_and_without_prefixes(prefix, under):
    content = {f"{prefix}a": torch.ones(1), f"{prefix}b.module.c": torch.zeros(1)}
    found = state_dict_in({"epoch": 3, "state_dict": content} if under else content)
    assert found == {"a": torch.ones(1), "b.module.c": torch.zeros(1)}


@pytest.mark.parametrize(
    "content",
    [None, 3, [1], torch.zeros(1), {3: torch.zeros(1)}, {"a": 3}, {"a": {}}, {"state_dict": 3}],
    ids=str,
)
def test_what_is_no_state_dict_is_told(content):
    assert state_dict_in(content) is None


class Quick(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Sigmoid(torch.nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(11.702 * x)


GELU, TANH = torch.nn.GELU(), torch.nn.GELU(approximate="tanh")


@pytest.mark.parametrize(
    ("layers", "activation"),
    [
        ([Quick()], "quickgelu"),
        ([GELU], "gelu"),
        ([TANH], None),
        ([GELU, TANH], None),
        ([GELU, Quick()], None),
        ([TANH, Quick()], None),
        ([Sigmoid()], None),
        ([torch.nn.ReLU()], None),
    ],
)
@pytest.mark.parametrize("way", ["trace", "script", "half"])
def test_an_archive_tells_only_an_activation_that_is_in_its_code(tmp_path, layers, activation, way):
    network, path = torch.nn.Sequential(*layers), tmp_path / "archive.pt"
    example = torch.ones(2).half() if way == "half" else torch.ones(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates TorchScript
        scripted = (
            torch.jit.script(network) if way == "script" else torch.jit.trace(network, example)
        )
        torch.jit.save(scripted, path)
    assert activation_of_script(*script(path)) == activation


def test_only_archives_have_code(tmp_path):
    torch.save({"code": torch.zeros(1)}, tmp_path / "code.pt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("a.txt", "code")
    (tmp_path / "text.pt").write_text("code")
    for name in ("code.pt", "other.zip", "text.pt", "missing.pt", "."):
        assert script(tmp_path / name) is None


# ------------------------------------------------------------------ names


def test_hugging_faces_names_go_back_and_forth_without_loss():
    state = randomise(CLIP(VIT)).state_dict()
    theirs, _ = to_hugging_face(state, {"name": "vit", **VIT})
    found = from_hugging_face(theirs)
    assert found.keys() == state.keys() and not set(theirs) & set(state) - {"logit_scale"}
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("shape", [(), (3,)])
def test_keys_that_do_not_go_with_their_queries_are_named(shape):
    state, _ = to_hugging_face(CLIP(VIT).state_dict(), {"name": "vit", **VIT})
    name = "text_model.encoder.layers.0.self_attn.k_proj.bias"
    assert name in state
    with pytest.raises(ValueError, match=r"transformer\.resblocks\.0\.attn\.k_proj\.bias"):
        from_hugging_face({**state, name: torch.zeros(shape)})


def test_hugging_face_has_no_resnet():
    with pytest.raises(ValueError, match="resnet.*no ModifiedResNet"):
        to_hugging_face(CLIP(RESNET).state_dict(), {"name": "resnet", **RESNET})


def test_what_is_no_weight_is_left_out_and_the_rest_becomes_float32():
    network = CLIP(RESNET).half()
    others = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    state = {**network.state_dict(), **{name: torch.tensor(3) for name in others}}
    state["logit_scale"] = state["logit_scale"].reshape(1)
    found = from_open_clip(state)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes(network)
    assert {t.dtype for t in found.values()} == {torch.float32, torch.int64}


def test_names_that_nobody_has_are_kept_so_that_they_can_be_reported():
    state, _ = to_hugging_face(CLIP(VIT).state_dict(), {"name": "vit", **VIT})
    del state["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    found = from_hugging_face({**state, "vision_model.extra.weight": torch.zeros(1)})
    assert "vision_model.extra.weight" in found
    assert "transformer.resblocks.1.attn.q_proj.bias" in found
    assert "transformer.resblocks.1.attn.in_proj_bias" not in found
