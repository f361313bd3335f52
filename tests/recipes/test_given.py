"""What is typed twice, or typed without a value, is refused; nothing is chosen in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_megacpp.errors import UserError
from nemo_megacpp.recipes.given import read_command_line, read_yaml
from nemo_megacpp.recipes.names import RUN_KEYS, TEXTS, field_owners, full_names
from nemo_megacpp.recipes.recipe import from_mapping, resolve


def _refused(*overrides: str, layout: str | None = None, world_size: str | None = None) -> str:
    with pytest.raises(UserError) as refusal:
        read_command_line(overrides, layout, world_size)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("overrides", "layout", "world_size", "both"),
    [
        (("tp=2", "tensor_parallel=4"), None, None, "tp=2 and tensor_parallel=4"),
        (("tp=2", "tp=2"), None, None, "tp=2 and tp=2"),
        (("steps=3", "lr=1", "max_steps=4"), None, None, "steps=3 and max_steps=4"),
        (("pattern=A", "hybrid_pattern=M"), None, None, "pattern=A and hybrid_pattern=M"),
        (("data=a", "data=b"), None, None, "data=a and data=b"),
        (("recipe=nam52", "recipe=nam56r"), None, None, "recipe=nam52 and recipe=nam56r"),
        (("tp=2",), "cp=2,TP=4", None, "tp=2 and TP=4 of --layout"),
        ((), "tp=2,tensor_parallelism=4", None, "tp=2 and tensor_parallelism=4"),
        (("tp_degree=2", "tp=4"), None, None, "tp_degree=2 and tp=4"),
        (("etp=1",), "expert_tp_degree=2", None, "etp=1 and expert_tp_degree=2 of --layout"),
        (("top_k=2", "moe_router_topk=4"), None, None, "top_k=2 and moe_router_topk=4"),
        (("world=4",), None, "8", "world=4 and --world-size 8"),
        ((), "world=8", "8", "world=8 of --layout and --world-size 8"),
    ],
)
def test_a_setting_that_is_typed_twice(
    overrides: tuple[str, ...], layout: str | None, world_size: str | None, both: str
) -> None:
    message = _refused(*overrides, layout=layout, world_size=world_size)
    assert f" is given twice: {both}. Give it once." in message


def test_a_file_may_be_overridden_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("tensor_parallel: 2\nsteps: 7\n")
    recipe = resolve(str(path), ["tp=4", "max_steps=9"])
    assert (recipe.layout.tp, recipe.training.max_steps) == (4, 9)


def test_every_setting_is_refused_without_a_value() -> None:
    for name in field_owners():
        for text in ("", " ", "''"):
            with pytest.raises(
                UserError, match=rf"^{name} is (empty\. Leave {name} out|not a setting)"
            ):
                from_mapping({}, read_command_line([f"{name}={text}"]))


def test_what_an_empty_value_would_mean_can_be_asked_for() -> None:
    assert "or write data=null for the built-in corpus" in _refused("data=")
    assert "or write resume=null for a run from scratch" in _refused("resume=")
    for name in {*RUN_KEYS, *TEXTS} - {"recipe"}:
        given = read_command_line([f"{name}=null"])
        assert given == {name: None}
        from_mapping({"wandb_project": "x", **given})
    with pytest.raises(UserError, match="There is no recipe ''"):
        resolve("")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[data/a, ]", "nothing after the last comma"),
        ("{data/a: 0.7, }", "nothing after the last comma"),
        ("{data/a: 0.7, data/a: 0.3}", "data gives data/a twice, again in line 1."),
        ("[data/a, '']", "data has a folder without a name"),
        ("{'': 0.7}", "data has a folder without a name"),
        ("[]", "data is an empty blend"),
    ],
)
def test_a_blend_with_a_gap(value: str, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        resolve("nam56r_tiny", [f"data={value}"])
    assert message in str(refusal.value)


def test_a_blend_without_weights_is_no_gap() -> None:
    """YAML writes a set as keys without values."""
    assert resolve("nam56r_tiny", ["data={a, b}"]).data == {"a": None, "b": None}


@pytest.mark.parametrize("line", ["data:", "data: ''", 'resume: " "', "tp:", "wandb_project:"])
def test_a_line_without_a_value(line: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"lr: 4e-3\n{line}\n")
    with pytest.raises(UserError, match=r" is empty\. Leave "):
        full_names(read_yaml(path))
    path.write_text("data: null\nresume: ~\netp: null\n")
    assert full_names(read_yaml(path)) == {
        "data": None,
        "resume": None,
        "expert_tensor_parallel_size": None,
    }


def test_the_words_of_the_articles_are_keys(tmp_path: Path) -> None:
    path = tmp_path / "articles.yaml"
    degrees = "tp_degree: 2\nexpert_tp_degree: 1\ncp_degree: 2\npp_degree: 2\nep_degree: 2\n"
    path.write_text(f"{degrees}sequence_parallel: true\ntop_k: 2\nglobal_bs: 16\n")
    recipe = resolve(str(path))
    assert recipe.layout.short() == "tp=2,sp=true,cp=2,pp=2,ep=2,etp=1"
    assert (recipe.model["moe_router_topk"], recipe.training.global_batch_size) == (2, 16)
    assert resolve("nam56r_tiny", layout="tp_degree=4").layout.tp == 4
    for word, why in (
        ("dp_degree=2", "it follows from the other degrees"),
        ("local_bs=4", "it is global_batch_size / DP"),
        ("tp_degre=4", "Did you mean 'tp_degree'?"),
    ):
        assert why in _refused(word)
