"""A session answers as the model generates, remembers what was said, and switches between adapters."""

import json
import shutil
import threading

import pytest
from support.chat_model import chat_model, transformers
from support.chat_session import directories

from nf4kernels.cli import main
from nf4kernels.integrations.transformers import Nf4Config
from nf4kernels.nn.quant_linear import QuantLinear
from nf4kernels.stages.chat.loading import load
from nf4kernels.stages.chat.session import Sampling, Session
from nf4kernels.stages.errors import StageError

GREEDY = Sampling(temperature=0, max_new_tokens=12)
QUESTION = "0. What colour is the apple?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return directories(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def loaded(made):
    """The model in 4 bits with both adapters, loaded once."""
    return load(made["model"], [str(made["first"]), f"other={made['second']}"], sampling=GREEDY)


@pytest.fixture
def session(loaded):
    """A conversation of its own with that model."""
    return Session(loaded.model, loaded.tokenizer, loaded.adapters, sampling=GREEDY)


def say(session, text=QUESTION):
    return "".join(session.answer(text))


def continued(model, tokenizer, text, special=False):
    """What `generate` makes of a text, without the session."""
    inputs = tokenizer(text, add_special_tokens=special, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False, max_new_tokens=12
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def generated(session, messages):
    """The same of a conversation, by the first adapter."""
    session.model.set_adapter("first")
    text = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return continued(session.model, session.tokenizer, text)


def test_greedy_is_what_generate_makes_and_it_streams(session):
    pieces = list(session.answer(QUESTION))
    assert len(pieces) > 1
    assert "".join(pieces) == generated(session, [{"role": "user", "content": QUESTION}])


def test_history_goes_into_the_template(session):
    first = say(session)
    second = say(session, "And the sky?")
    said = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And the sky?"},
    ]
    assert session.history == [*said, {"role": "assistant", "content": second}]
    assert second == generated(session, said)
    assert second != generated(session, said[-1:]), "the history makes no difference: the test shows nothing"


def test_clear_begins_anew(session):
    first = say(session)
    say(session, "And the sky?")
    session.clear()
    assert session.history == []
    assert say(session) == first


def test_adapters_switch_there_and_back(session):
    answers = {}
    for name in ("first", "other", "none"):
        session.clear()
        session.switch(name)
        answers[name] = say(session)
    assert len(set(answers.values())) == 3
    for name in ("first", "none", "other"):
        session.clear()
        session.switch(name)
        assert say(session) == answers[name]
    with pytest.raises(StageError, match="must be one of first, other, none, got third"):
        session.switch("third")


def test_none_is_the_base(session, made):
    session.switch("none")
    bare = load(made["model"], sampling=GREEDY)
    assert bare.adapters == []
    assert say(session) == say(bare)


def test_system_prompt(session):
    session.set_system("Answer in verse.")
    answer = say(session)
    messages = [{"role": "system", "content": "Answer in verse."}, {"role": "user", "content": QUESTION}]
    assert answer == generated(session, messages) != generated(session, messages[1:])
    session.clear()
    assert session.system == "Answer in verse."
    session.set_system("")
    assert say(session) == generated(session, messages[1:])


def test_a_template_without_room_for_a_system_prompt(session, monkeypatch):
    leaves_out = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    monkeypatch.setattr(session.tokenizer, "chat_template", leaves_out)
    with pytest.raises(StageError, match="leaves it out"):
        session.set_system("Answer in verse.")
    monkeypatch.setattr(session.tokenizer, "chat_template", "{{ raise_exception('System role not supported') }}")
    with pytest.raises(StageError, match="takes no system prompt: System role not supported"):
        session.set_system("Answer in verse.")
    assert session.system is None


def test_an_answer_that_is_closed_stops_and_is_remembered(session):
    long = Session(session.model, session.tokenizer, session.adapters, sampling=Sampling(0, max_new_tokens=150))
    stream = long.answer(QUESTION)
    piece = next(stream)
    before = threading.active_count()
    stream.close()
    assert threading.active_count() == before - 1, "the model is still at work"
    assert long.history[-1] == {"role": "assistant", "content": piece}
    assert say(session), "the next answer waits for ever"


def test_an_error_of_the_model_reaches_the_reader(session, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        say(session)
    assert session.history == []


def test_too_long_a_conversation(session):
    with pytest.raises(StageError, match="must be shorter than the 256 tokens"):
        say(session, "apple " * 300)
    assert session.history == []
    assert say(session)


def test_an_answer_ends_where_the_model_can_read_no_more(session, monkeypatch):
    lengths = []
    generate = session.model.generate
    monkeypatch.setattr(session.model, "generate", lambda **options: lengths.append(options) or generate(**options))
    session.sampling = Sampling(0, max_new_tokens=10**6)
    assert say(session, "apple " * 80)
    assert lengths[0]["max_new_tokens"] == 256 - lengths[0]["input_ids"].shape[1]


def test_sampling(session):
    def drawn(**options):
        session.clear()
        session.sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 12, **options})
        return say(session)

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    greedy = generated(session, [{"role": "user", "content": QUESTION}])
    assert drawn(top_k=1) == drawn(top_p=1e-6) == drawn(temperature=0) == greedy
    assert len({drawn(temperature=5.0) for _ in range(4)}) > 1


@pytest.mark.parametrize(
    ("option", "value"), [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_sampling_out_of_range(option, value):
    with pytest.raises(StageError, match=f"--{option.replace('_', '-')} must be .*, got {value}"):
        Sampling(**{option: value})


def test_without_a_template_the_text_goes_on(made):
    session = load(made["plain"], sampling=GREEDY)
    assert not session.has_template
    first = say(session, "The apple is")
    second = say(session, "The sky is")
    assert first == continued(session.model, session.tokenizer, "The apple is", special=True)
    text = f"The apple is{first}\nThe sky is"
    assert second == continued(session.model, session.tokenizer, text, special=True)
    with pytest.raises(StageError, match="needs a model with a chat template"):
        session.set_system("Answer in verse.")


def quantized(session):
    return [module for module in session.model.modules() if isinstance(module, QuantLinear)]


def test_what_is_quantized(made, tmp_path):
    assert quantized(load(made["model"], dense=True)) == []
    four_bit = load(made["model"], sampling=GREEDY)
    assert len(quantized(four_bit)) == 14
    four_bit.model.save_pretrained(tmp_path / "four")
    four_bit.tokenizer.save_pretrained(tmp_path / "four")
    again = load(tmp_path / "four", sampling=GREEDY)
    assert len(quantized(again)) == 14
    assert say(again) == say(four_bit)
    with pytest.raises(StageError, match="--dense must be left out"):
        load(tmp_path / "four", dense=True)


@pytest.mark.parametrize("block_size", [64, 128])
def test_what_quantize_writes_is_loaded_as_it_is(made, tmp_path, block_size):
    assert main(["quantize", str(made["model"]), str(tmp_path / "four"), "--block-size", str(block_size)]) == 0
    session = load(tmp_path / "four", sampling=GREEDY)
    assert len(quantized(session)) == 14
    assert {module.block_size for module in quantized(session)} == {block_size}
    quantized_here = transformers.AutoModelForCausalLM.from_pretrained(
        made["model"], quantization_config=Nf4Config(block_size=block_size)
    )
    assert say(session) == say(Session(quantized_here.eval(), session.tokenizer, sampling=GREEDY))


def test_an_adapter_alone_finds_its_base(made, session):
    alone = load(made["first"], [str(made["second"])], sampling=GREEDY)
    assert alone.adapters == ["first", "second"]
    assert say(alone) == say(session)


def test_an_adapter_names_its_base_beside_it(made, tmp_path):
    """A path that is seen from the adapter, as of two directories that were moved together."""
    shutil.copytree(made["first"], tmp_path / "tuned")
    shutil.copytree(made["model"], tmp_path / "base")
    file = tmp_path / "tuned" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": "../base"}), encoding="utf-8")
    assert load(tmp_path / "tuned").adapters == ["tuned"]
    assert main(["merge", str(tmp_path / "tuned"), str(tmp_path / "merged")]) == 0
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}), encoding="utf-8")
    with pytest.raises(StageError, match="must name its base, got None: give the base as MODEL"):
        load(tmp_path / "tuned")


def test_fp4_of_bitsandbytes_format_is_loaded_as_it_is(made, tmp_path):
    assert (
        main(["quantize", str(made["model"]), str(tmp_path / "fp4"), "--codebook", "fp4", "--block-size", "128"]) == 0
    )
    layer = load(tmp_path / "fp4").model.model.layers[0].mlp.up_proj
    assert (layer.codebook, layer.block_size) == ("fp4", 128)


def test_the_template_of_a_fine_tune_is_used(made, session, tmp_path):
    """The base has none, the adapter brought one."""
    shutil.copytree(made["first"], tmp_path / "tuned")
    session.tokenizer.save_pretrained(tmp_path / "tuned")
    config = json.loads((tmp_path / "tuned" / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(made["plain"])
    (tmp_path / "tuned" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load(tmp_path / "tuned").has_template


def test_refused(made, tmp_path):
    first = str(made["first"])
    with pytest.raises(StageError, match="MODEL must be a directory with a config"):
        load(tmp_path)
    with pytest.raises(StageError, match="--adapter must be a directory with an adapter_config"):
        load(made["model"], [str(tmp_path)])
    with pytest.raises(StageError, match="another name for each"):
        load(made["model"], [first, first])
    with pytest.raises(StageError, match="NAME must have no dots"):
        load(made["model"], [f"none={first}"])
    (tmp_path / "lost").mkdir()
    config = (made["first"] / "adapter_config.json").read_text(encoding="utf-8")
    (tmp_path / "lost" / "adapter_config.json").write_text(
        config.replace(str(made["model"]), "/not/there"), encoding="utf-8"
    )
    with pytest.raises(StageError, match="must name its base, got /not/there"):
        load(tmp_path / "lost")


def test_an_adapter_of_another_model(made, tmp_path):
    chat_model(tmp_path / "wide", hidden_size=128)
    with pytest.raises(StageError, match="must fit"):
        load(tmp_path / "wide", [str(made["first"])])
