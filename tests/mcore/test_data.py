"""Shares of sources drawn so far, counted without the whole index in memory."""

import tracemalloc

import numpy

from megamoe.mcore.data import Drawn


def indices(tmp_path, num_samples):
    """Return which of 3 sources each sample is of, as Megatron-core has it: int16, on disk."""
    generator = numpy.random.default_rng(5)
    file = numpy.memmap(tmp_path / "index", numpy.int16, "w+", shape=(num_samples,))
    file[:] = generator.integers(0, 3, num_samples)
    return file


def test_sources_are_counted_from_where_the_last_count_ended(tmp_path):
    index = indices(tmp_path, 3_000_000)
    drawn = Drawn(4)  # of the last source there is nothing
    for num_samples in (0, 5, 1_048_576, 1_048_577, 2_999_999, 3_000_000, 7):
        expected = [int((index[:num_samples] == source).sum()) for source in range(4)]
        assert drawn.count(index, num_samples) == expected
    read = []

    class Recording(numpy.ndarray):
        def __getitem__(self, key):
            read.append((key.start, key.stop))
            return numpy.asarray(super().__getitem__(key))

    drawn.count(index.view(Recording), 3_000_000)
    drawn.count(index.view(Recording), 3_000_000)
    assert read == [(7, 1_048_583), (1_048_583, 2_097_159), (2_097_159, 3_000_000)]


def test_counting_takes_no_memory_in_proportion_to_what_was_drawn(tmp_path):
    num_samples = 8_000_000
    index = indices(tmp_path, num_samples)
    tracemalloc.start()
    Drawn(3).count(index, num_samples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 8 * 2**20, "a block of a million samples, 8 bytes each"
