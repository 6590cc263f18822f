"""The two frozen backbones that the package ships, and the check that a language model must pass."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from data_shards.glyphs.backbones import (
    CHECKSUMS,
    LanguageRecipe,
    TowerRecipe,
    build_language_model,
    check_induction,
    image_processor,
    make_backbones,
    nearest_prototype,
    text_few_shot,
    tower_features,
    tower_input,
)
from data_shards.glyphs.pictures import ASSETS, PictureKey, load_world
from data_shards.glyphs.words import build_tokenizer
from flamingo.errors import FlamingoError

# Results were measured with exactly these weights.
SHIPPED = {
    "vision/model.safetensors": "af533700c733f4de988ad14f703a71242ae3816633c82305bc51becf242bf47c",
    "language/model.safetensors": "febe3c10fd38bcd24e028e3085eca5d76cdfc73d50b88a5f898b64a0e67223dc",
    "language/tokenizer.json": "b8c100d3003042009f6ee79947b2088e0197fd78694513a58db58468b3afd224",
}


@pytest.fixture(scope="module")
def language():
    return AutoModelForCausalLM.from_pretrained(ASSETS / "language"), AutoTokenizer.from_pretrained(ASSETS / "language")


@pytest.fixture(scope="module")
def tower():
    return AutoModel.from_pretrained(ASSETS / "vision")


@pytest.mark.parametrize("name", list(SHIPPED))
def test_shipped_files_are_the_ones_that_were_measured(name):
    """Weights exchanged without new measurements would make every kept figure wrong."""
    assert hashlib.sha256((ASSETS / name).read_bytes()).hexdigest() == SHIPPED[name]


def test_checksums_cover_every_shipped_file():
    """A file that SHA256SUMS does not list, or lists wrongly, could change unnoticed."""
    listed = dict(reversed(line.split("  ")) for line in (ASSETS / CHECKSUMS).read_text().splitlines())
    present = {p.relative_to(ASSETS).as_posix(): p for p in ASSETS.rglob("*") if p.is_file() and p.name != CHECKSUMS}
    assert listed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in present.items()}
    assert sum(path.stat().st_size for path in present.values()) < 5e6


def test_shipped_tokenizer_is_the_one_of_the_code(language):
    """A vocabulary changed in words.py, but not in the assets, would give the model's embeddings other words."""
    assert language[1].get_vocab() == build_tokenizer().get_vocab()
    text = "User: what is this? GPT:<answer> kobu<|endofchunk|>"
    assert language[1](text).input_ids == build_tokenizer()(text).input_ids
    assert language[1].decode(language[1](text).input_ids) == text


def test_shipped_recipe_is_the_one_of_the_code():
    """`--from-scratch` would silently make something else than what is shipped."""
    recipe = json.loads((ASSETS / "RECIPE.json").read_text())
    expected = json.loads(json.dumps({"tower": vars(TowerRecipe()), "language": vars(LanguageRecipe())}))
    assert {name: recipe[name] for name in expected} == expected


def test_shipped_language_model_has_induction(language):
    """Without induction a Flamingo stays at chance in context, while naming looks perfect."""
    assert check_induction(*language) >= 0.9


def test_random_language_model_is_refused(language):
    """A check that lets a random model pass checks nothing."""
    torch.manual_seed(0)
    model = build_language_model(LanguageRecipe(), language[1])
    with pytest.raises(FlamingoError, match=r"Lfm2ForCausalLM.* accuracy 0\.0\d\d, at least 0\.9 is needed"):
        check_induction(model, language[1])


@pytest.mark.parametrize("chunks", [5, 41])
def test_language_model_learns_names_in_long_contexts(language, chunks):
    """41 chunks are 8 shots of 5 classes and the query: longer than any training sequence of a Flamingo."""
    assert text_few_shot(*language, chunks=chunks, count=60) > 0.9


def test_tower_tells_new_classes_apart(tower):
    """A tower exchanged for a weaker one bounds all few-shot scores from above."""
    world = load_world()
    ids = world.split("validation")[:40]
    levels = world.pictures([PictureKey(c, variant, 2) for c in ids for variant in range(6)])
    features = tower_features(tower, levels)
    labels = torch.arange(len(ids)).repeat_interleave(6)
    assert nearest_prototype(features, labels, ways=5, shots=1, episodes=400) > 0.9
    random = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    assert nearest_prototype(random, labels, ways=5, shots=1, episodes=400) < 0.3


def test_tower_is_small_and_frozen_in_shape(tower):
    """The tower runs in every training step: (N, 1, 64, 64) to 4×4 positions of 128 features."""
    with torch.no_grad():
        assert tower(torch.zeros(3, 1, 64, 64)).last_hidden_state.shape == (3, 128, 4, 4)
    assert tower.config.num_channels == 1


def test_preprocessor_describes_what_the_tower_was_trained_on(tower):
    """A processor that normalises otherwise would feed the tower pictures it has never seen the like of."""
    written = json.loads((ASSETS / "vision" / "preprocessor_config.json").read_text())
    assert written == image_processor()
    level = torch.full((1, 32, 32), 15)
    expected = (255 * written["rescale_factor"] - written["image_mean"][0]) / written["image_std"][0]
    pixels = tower_input(level)
    assert pixels.shape == (1, 1, written["size"]["height"], written["size"]["width"])
    assert torch.allclose(pixels, torch.tensor(expected))


def test_backbones_without_induction_are_not_written(tmp_path):
    """A quickstart would go on for minutes on a language model that can never learn in context."""
    recipe = LanguageRecipe(steps=2, copying_steps=1, tokens=128)
    with pytest.raises(FlamingoError, match="induction"):
        make_backbones(tmp_path, seed=0, tower=TowerRecipe(steps=1, variants=1), language=recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
