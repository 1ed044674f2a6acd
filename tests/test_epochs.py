import math

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from wmss_trl.loop.epoch_plan import EpochPlan, batches_per_process


@pytest.mark.parametrize("accumulation", [1, 3, 100])
@pytest.mark.parametrize("sft_epochs", [0, 1, 2])
@pytest.mark.parametrize(("full_batches", "active_batches"), [(10, 7), (1, 1), (2, 1)])
def test_plan_equals_walking_through_the_run(full_batches, active_batches, sft_epochs, accumulation):
    plan = EpochPlan(sft_epochs, full_batches, active_batches, accumulation)
    walk = []  # (epoch, step within the epoch) of every optimizer step
    for epoch in range(5):
        batches = full_batches if epoch < sft_epochs else active_batches
        walk += [(epoch, step) for step in range(len(range(0, batches, accumulation)))]
        assert plan.total_steps(epoch + 1) == len(walk)
    for step, place in enumerate(walk):
        assert plan.locate(step) == place
        assert plan.num_epochs(step + 1) == place[0] + 1


def test_a_fraction_of_an_epoch_counts_as_that_share_of_it():
    plan = EpochPlan(sft_epochs=1, full_batches=10, active_batches=6, accumulation=1)
    assert plan.total_steps(2.5) == 10 + 6 + 3
    assert plan.total_steps(0.5) == math.ceil(0.5 * 10)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_per_process_is_the_length_of_accelerates_data_loaders(num_processes, drop_last):
    for num_examples in range(1, 40):
        batches = BatchSampler(range(num_examples), 4, drop_last)
        shards = [BatchSamplerShard(batches, num_processes, rank) for rank in range(num_processes)]
        expected = {len(list(shard)) for shard in shards}
        if drop_last or num_examples >= 4 * num_processes:  # else accelerate repeats examples, as many times as needed
            assert {batches_per_process(num_examples, 4, num_processes, drop_last)} == expected
