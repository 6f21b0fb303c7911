"""The promise: a pool of keys is a pool of budgets. What one key refuses the next one serves, unseen by the caller and paid once,
and a key that said that it is out is left alone. The trials of soak_rotation.py at a size for every day."""

import contextlib

import pytest
import rotation
from fleet import Fleet
from harness import Stack, pool
from rotation import CLAUDE, DEATHS, GPT

# Who repeats a try: Envoy's router, or the gate by callouts of its own.
ROTATIONS = ["router"]


def passes(trial):
    """A trial without findings; what it saw stands in the output of `pytest -s`."""
    print("\n" + trial.row())
    assert not trial.findings, "\n".join([trial.row(), *trial.findings[:40]])


@pytest.fixture(params=ROTATIONS)
def rotating(request):
    """A system of one's own with a pool of so many keys: what happens to them stays with them."""
    with contextlib.ExitStack() as stacks:
        def start(size, model=GPT, kind=Stack, concurrency=2, **options):
            credentials = pool(size, rotation.provider_of(model))
            return stacks.enter_context(kind(concurrency=concurrency, credentials=credentials, rotation=request.param, **options))
        yield start


MODELS = pytest.mark.parametrize("model", [GPT, CLAUDE])


@MODELS
def test_one_key_of_five_serves_all(rotating, model):
    passes(rotation.four_of_five(rotating(5, model), requests=200, at_once=40, model=model))


def test_a_rotated_stream_begins_hardly_later(rotating):
    passes(rotation.first_token(rotating(5), pairs=8))


@MODELS
def test_as_many_tries_as_there_are_keys(rotating, model):
    passes(rotation.no_hidden_cap(rotating(12, model), model=model))


@pytest.mark.parametrize(("model", "kind"), [(model, kind) for model in (GPT, CLAUDE) for kind in DEATHS[rotation.provider_of(model)]])
def test_a_key_that_is_out_is_not_asked_again(rotating, model, kind):
    passes(rotation.dies(rotating(3, model), kind, model=model))


@MODELS
def test_keys_that_are_all_rejected_are_no_fault_of_the_caller(rotating, model):
    passes(rotation.all_rejected(rotating(3, model), model=model))


@MODELS
def test_an_overloaded_provider_is_passed_on(rotating, model):
    passes(rotation.overloaded(rotating(3, model), model=model))


def test_large_bodies_rotate_up_to_the_limit(rotating):
    passes(rotation.large_bodies(rotating(3)))


@MODELS
def test_when_all_are_limited_the_soonest_is_told(rotating, model):
    passes(rotation.all_limited(rotating(4, model), model=model))


def test_a_storm_of_retries_does_not_reach_the_provider(rotating):
    passes(rotation.storm(rotating(5), clients=60, cores=None))


def test_a_key_is_out_on_every_worker_of_every_envoy(rotating):
    passes(rotation.everywhere(rotating(5, kind=Fleet, concurrency=4)))


def test_envoy_is_killed_in_the_middle_of_a_rotation(rotating):
    passes(rotation.killed(rotating(5, hold_ttl=4)))
