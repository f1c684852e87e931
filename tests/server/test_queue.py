"""The queue by theory: equal shares, bounded waiting, full batches."""

import random
from collections import Counter

import pytest

from dalle2_jax.server.engine.queue import MAX_PASSES, FairQueue, Item, Step

PREPARE, FIRST, LAST = Step("prepare", 0, batched=False), Step("decoder", 1), Step("upsampler", 2)


def submit(queue, owner, rows, step=FIRST):
    tag = queue.admit(owner, rows)
    queue.add(owner, [Item(step, None, position) for position in range(rows)], tag)


def owners(batch):
    return Counter(entry.ticket for entry in batch)


def test_a_flood_of_one_owner_does_not_delay_another():
    queue = FairQueue()
    submit(queue, "flood", 100)
    queue.take((8,))
    submit(queue, "one", 1)
    assert owners(queue.take((8,)))["one"] == 1


def test_owners_with_much_to_do_get_equal_shares():
    queue = FairQueue()
    for owner in ("a", "b", "c"):
        submit(queue, owner, 40)
    served = Counter()
    for _ in range(10):
        served += owners(queue.take((6,)))
        assert max(served.values()) - min(served.values()) <= 1


def test_idle_time_is_not_saved_up():
    """An owner who comes late gets half from then on, not all."""
    queue = FairQueue()
    submit(queue, "early", 80)
    for _ in range(5):
        queue.take((8,))
    submit(queue, "late", 20)
    assert owners(queue.take((8,))) == {"early": 4, "late": 4}


def test_one_owner_is_served_in_order():
    queue = FairQueue()
    for number in range(3):
        tag = queue.admit("me", 2)
        queue.add(number, [Item(FIRST, None, 0), Item(FIRST, None, 1)], tag)
    assert [entry.ticket for entry in queue.take((8,))] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("waiting", "counts"), [(1, [1]), (3, [3]), (5, [4, 1]), (6, [6]), (9, [8, 1]), (11, [8, 3]), (12, [8, 4])]
)
def test_rows_that_leave_a_batch_rather_empty_fill_a_smaller_one(waiting, counts):
    queue = FairQueue()
    queue.add(0, [Item(FIRST, None, number) for number in range(waiting)], queue.admit("me", waiting))
    assert [len(queue.take((1, 2, 4, 8))) for _ in counts] == counts
    assert not queue.take((1, 2, 4, 8))


def test_a_single_size_takes_all_rows():
    queue = FairQueue()
    queue.add(0, [Item(FIRST, None, number) for number in range(5)], queue.admit("me", 5))
    assert len(queue.take((8,))) == 5


def test_full_batches_of_the_last_step_come_first_and_else_the_earliest_step():
    queue = FairQueue()
    submit(queue, "a", 3, LAST)
    submit(queue, "a", 4, FIRST)
    assert queue.take((4,))[0].item.step == FIRST  # a full batch
    submit(queue, "a", 1, FIRST)
    assert queue.take((4,))[0].item.step == FIRST  # neither is full: its row may join the other three
    submit(queue, "a", 1, LAST)
    submit(queue, "a", 4, FIRST)
    assert [entry.item.step for entry in queue.take((4,))] == [LAST] * 4


def test_items_that_cannot_share_a_batch_run_alone():
    queue = FairQueue()
    submit(queue, "a", 3, PREPARE)
    assert [len(queue.take((8,))) for _ in range(4)] == [1, 1, 1, 0]


def test_rare_settings_wait_for_a_bounded_number_of_batches():
    """A row of its own settings is never full, while others always are."""
    queue = FairQueue()
    submit(queue, "rare", 1, Step("rare", 1))
    batches = 0
    submit(queue, "common", 16)
    while not owners(queue.take((8,)))["rare"]:
        submit(queue, "common", 16)
        batches += 1
    assert batches <= MAX_PASSES


def test_requests_that_arrive_together_are_prepared_before_a_partial_batch_runs():
    """Their rows then fill it, or a batch of their own."""
    queue = FairQueue()
    submit(queue, "waiting", 4, LAST)
    submit(queue, "returned", 8, PREPARE)
    assert [queue.take((8,))[0].item.step for _ in range(9)] == [PREPARE] * 8 + [LAST]


def test_single_items_that_never_end_let_others_run():
    queue = FairQueue()
    submit(queue, "waiting", 1)
    batches = 0
    submit(queue, "flood", 2, PREPARE)
    while not owners(queue.take((8,)))["waiting"]:
        submit(queue, "flood", 2, PREPARE)
        batches += 1
    assert batches <= 8 * MAX_PASSES


@pytest.mark.parametrize("seed", range(5))
def test_every_item_is_taken_once_whatever_the_order(seed):
    chance, queue, expected, taken = random.Random(seed), FairQueue(), Counter(), []
    for _ in range(200):
        if chance.random() < 0.6:
            owner, rows = chance.choice("abcd"), chance.randint(1, 5)
            submit(queue, owner, rows, Step(chance.choice("xyz"), chance.randint(0, 2), chance.random() < 0.8))
            expected[owner] += rows
        else:
            batch = queue.take((chance.choice([1, 4, 8]),))
            assert len({entry.item.step for entry in batch}) <= 1
            taken += batch
    while batch := queue.take((8,)):
        taken += batch
    assert owners(taken) == expected and len(set(map(id, taken))) == len(taken) and len(queue) == 0


def test_discarded_entries_are_gone():
    queue = FairQueue()
    submit(queue, "a", 3)
    submit(queue, "b", 2)
    assert len(queue.discard(lambda entry: entry.ticket == "a")) == 3
    assert owners(queue.take((8,))) == {"b": 2} and not queue.discard(lambda entry: True)
