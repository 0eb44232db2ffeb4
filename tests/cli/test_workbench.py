import json
import logging
import os

import pytest
import torch
import yaml
from tiny import byte_tokenizer, tiny
from tiny_run import arguments

from qat.cli.main import positional
from qat.cli.rundir import RunDir
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.cli.workbench import cast, device_name, open_workbench, pick_device, quiet
from qat.data.calibration import calibration
from qat.models import hf


@pytest.fixture
def config(root, tmp_path):
    verb, *texts = arguments(root, "run", f"runs={tmp_path / 'runs'}")
    found, problems = validate(VERBS[verb], positional(VERBS[verb], texts), Tree.of([]))
    assert problems == []
    return found


def test_everything_an_arm_works_on(config, root):
    bench = open_workbench(config)
    assert bench.device == torch.device("cpu")
    assert bench.dtype == torch.bfloat16
    assert bench.windows.shape == (4, 32)
    assert torch.cat(bench.calibration).shape == (2, 32)
    assert len(bench.plan.quantized) == 7
    assert all(p.dtype == torch.float32 for p in bench.model.parameters())
    assert bench.judged is bench.model
    assert [len(p) for p in bench.prompts] == [len(text) for text in bench.config["prompts"]]
    assert bench.config["observer"]["points"] == 4
    assert bench.config["calibration"]["batch_size"] == 1
    assert bench.build("observer").points == 4
    facts = json.loads((bench.run.path / "run.json").read_text())
    assert facts["data"] == {"path": str(root / "tokens"), "fingerprint": bench.tokens.fingerprint}
    assert yaml.safe_load((bench.run.path / "config.yaml").read_text()) == bench.config


def test_the_calibration_seed_chooses_the_windows(config):
    drawn = []
    for seed in (0, 1):
        bench = open_workbench(config | {"calibration": config["calibration"] | {"seed": seed}})
        drawn.append(torch.cat(bench.calibration))
        assert torch.equal(drawn[-1], torch.cat(calibration(bench.tokens, 2, 32, 1, seed)))
    assert not torch.equal(*drawn)


def test_choices_by_device_are_made(config):
    config["optim"]["lr"] = {"cpu": 1.0, "cuda": 2.0}
    assert open_workbench(config).config["optim"]["lr"] == 1.0


def test_a_run_that_is_given_stays_as_it_is(config):
    path = open_workbench(config).run.path
    before = {name: (path / name).read_bytes() for name in ("config.yaml", "run.json")}
    bench = open_workbench(config | {"seed": 5}, RunDir.existing(path))
    assert bench.run.path == path
    assert {name: (path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("key", ["data", "calibration", "evaluation"])
def test_sequences_beyond_the_models_context(config, tmp_path, key):
    config[key]["seq_len"] = 257
    with pytest.raises(ValueError, match=rf"{key}\.seq_len=257: the model takes 256 tokens at most"):
        open_workbench(config)
    assert not (tmp_path / "runs").exists()


def test_the_recipe_must_fit_the_model(config, tmp_path):
    config["recipe"]["rules"]["linears"]["match"] = "nothing"
    with pytest.raises(ValueError, match="matches no module"):
        open_workbench(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("awq", r"^model\.layers\.0\.\S+: awq carries integers of 4 bits; int3_g32_signed cannot be exported"),
        ("gguf", r"^model\.layers\.0\.\S+: gguf carries integers of 4 bits"),
        ("gptq", None),
        ("none", None),
    ],
)
def test_the_recipe_must_fit_the_format_that_is_written(config, tmp_path, name, message):
    config["format"]["name"] = name
    config["recipe"]["rules"]["linears"]["weight"]["grid"]["bits"] = 3
    if message is None:
        assert open_workbench(config).config["format"]["name"] == name
        return
    with pytest.raises(ValueError, match=message):
        open_workbench(config)
    assert not (tmp_path / "runs").exists()


def test_a_model_that_gguf_could_not_say_is_refused_before_a_run_begins(config, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    tiny(layers=1, rope_parameters=rope).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    config["format"]["name"] = "gguf"
    config["model"]["path"] = str(tmp_path / "model")
    with pytest.raises(ValueError, match="rope_type 'linear' is not written to GGUF"):
        open_workbench(config)
    assert not (tmp_path / "runs").exists()


def test_a_gpu_that_is_not_there():
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device=cuda: this machine has 0 CUDA devices; use device=cpu"):
        pick_device("cuda")


def test_threads_are_set_where_they_are_asked_for(config):
    before = torch.get_num_threads()
    try:
        bench = open_workbench(config | {"threads": before + 1})
        assert torch.get_num_threads() == bench.run.facts["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_cast_keeps_buffers_and_ties():
    model = cast(tiny(), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_third_parties_are_quiet_and_the_users_choice_stands(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    quiet()
    assert logging.getLogger("transformers").level == logging.ERROR
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_device_has_a_name():
    assert device_name(torch.device("cpu"))


@pytest.mark.parametrize("what", ["data", "model"])
def test_a_run_does_not_go_on_with_another_content_under_the_same_name(config, what):
    first = open_workbench(config).run
    facts = json.loads((first.path / "run.json").read_text())
    assert len(facts[what]["fingerprint"]) == 64
    first.write("run.json", facts | {what: facts[what] | {"fingerprint": "0" * 64}})
    path = first.path
    del first
    with pytest.raises(ValueError, match=f"this run began with another {what}, under the same name"):
        open_workbench(config)
    with pytest.raises(ValueError, match=f"another {what}"):
        open_workbench(config, RunDir.existing(path))


def test_what_the_certificate_cannot_prove_is_refused_before_training(config, monkeypatch):
    config["certificate"]["new_tokens"] = 250
    with pytest.raises(ValueError, match=r"certificate\.new_tokens: .* \d+ tokens; the model takes 256"):
        open_workbench(config)
    config["certificate"]["new_tokens"] = 32
    monkeypatch.setattr("qat.cli.workbench.ARCHITECTURES", {"Qwen3ForCausalLM": None})
    with pytest.raises(ValueError, match="the engine does not serve LlamaForCausalLM"):
        open_workbench(config)


def test_a_cache_that_the_model_cannot_have_is_refused_before_there_is_a_run(config, monkeypatch):
    from qat.cli import workbench

    def refuse(model, kv):
        raise ValueError("recipe.kv: refused")

    monkeypatch.setattr(workbench, "check_kv", refuse)
    kv = {"_target_": "qat.numerics.scheme.Scheme", "dynamic": True, "convention": "vllm"} | {
        "grid": {"_target_": "qat.numerics.grid.IntGrid", "bits": 8},
        "granularity": {"_target_": "qat.numerics.granularity.PerToken"},
    }
    with pytest.raises(ValueError, match=r"recipe\.kv: refused"):
        open_workbench(config | {"recipe": config["recipe"] | {"kv": kv}})
    assert not os.path.exists(config["runs"])


@pytest.mark.parametrize("place", ["method", "arms", "init"])
def test_a_tied_head_that_cannot_follow_a_rotation_is_refused_before_there_is_a_run(config, place, monkeypatch):
    from qat.cli import workbench

    read = hf.load

    def load(*args, **kwargs):
        model, tokenizer = read(*args, **kwargs)
        model.lm_head.weight = model.model.embed_tokens.weight
        model.model.norm.weight.data[0] = 2.0
        return model, tokenizer

    monkeypatch.setattr(workbench.hf, "load", load)
    rotate = {"_target_": "qat.ptq.rotate.rotate"}  # its residual is true if it does not say
    own = config.pop("arms")  # of which none rotates
    placed = {"method": rotate, "arms": own | {"gptq": {"then": rotate}}, "init": {"method": rotate}}
    with pytest.raises(ValueError, match=r"model\.norm: its weight is not one number .*model\.untie=true"):
        open_workbench(config | {"arms": own} | {place: placed[place]})
    assert not os.path.exists(config["runs"])
    rotate["residual"] = False
    open_workbench(config | {"arms": own} | {place: placed[place]})
