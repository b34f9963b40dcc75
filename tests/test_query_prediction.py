"""Which layers prefetching may rely on: told apart by weights that make the query certain, or not."""

from pathlib import Path

import pytest

from clo.gpu_worker.cache.query_prediction import QuerySource, measure_query_sources
from clo.gpu_worker.in_process import make_engine
from clo.gpu_worker.model.decoder import Decoder, load_decoder
from clo.runtime.config import CacheConfig, ModelConfig
from clo.runtime.model.files import resolve


@pytest.fixture
def decoder(tiny_model: Path) -> Decoder:
    return load_decoder(resolve(ModelConfig(model=str(tiny_model), device="cpu")))


def test_a_query_that_nothing_changes_is_known_from_the_input(decoder: Decoder) -> None:
    for layer in decoder._weights.layers:
        layer.output.weight.zero_()
        layer.down.weight.zero_()
    assert measure_query_sources(decoder) == (
        QuerySource.OWN,
        QuerySource.INPUT,
        QuerySource.INPUT,
        QuerySource.INPUT,
    )


def test_a_query_that_attention_alone_changes_is_known_behind_it(decoder: Decoder) -> None:
    for layer in decoder._weights.layers:
        layer.output.weight.mul_(10)
        layer.down.weight.zero_()
    assert measure_query_sources(decoder) == (
        QuerySource.OWN,
        QuerySource.MIDDLE,
        QuerySource.MIDDLE,
        QuerySource.MIDDLE,
    )


def test_a_query_that_the_mlp_changes_is_known_to_its_layer_alone(decoder: Decoder) -> None:
    decoder._weights.layers[1].output.weight.zero_()
    decoder._weights.layers[1].down.weight.mul_(10)
    assert measure_query_sources(decoder)[2] is QuerySource.OWN


def test_the_first_layers_of_a_real_model_need_their_own_query(smollm2: Path) -> None:
    sources = measure_query_sources(load_decoder(resolve(ModelConfig(model=str(smollm2), device="cpu"))))
    assert sources[:2] == (QuerySource.OWN, QuerySource.OWN)
    assert sources.count(QuerySource.INPUT) > 20, "of 30"


@pytest.mark.parametrize("config", [CacheConfig(attention="topk"), CacheConfig(prefetch="off")])
def test_without_prefetch_every_layer_selects_with_its_own_query(
    decoder: Decoder, config: CacheConfig
) -> None:
    assert set(make_engine(decoder, config, 1, 100)._decode._sources) == {QuerySource.OWN}
