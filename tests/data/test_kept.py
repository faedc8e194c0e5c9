"""Images that are kept in memory: shared by forks, as they were, within the room, whatever happens to a process."""

import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest
from PIL import Image

from deit.data.kept import Kept
from deit.image.jpeg import Pixels

FORK = multiprocessing.get_context("fork")


def pixels(number, rows=6, columns=5):
    return np.random.default_rng(number).integers(0, 256, (rows, columns, 3), dtype=np.uint8)


def same(found, expected):
    if isinstance(expected, Image.Image):
        return isinstance(found, Image.Image) and np.array_equal(np.asarray(found), np.asarray(expected))
    return (found.size, found.scale, found.orientation) == (
        expected.size,
        expected.scale,
        expected.orientation,
    ) and np.array_equal(found.stored, expected.stored)


def in_a_fork(work):
    process = FORK.Process(target=work)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("processes", [0, 2])
def test_an_image_comes_back_as_it_was_put_in(processes):
    kept = Kept(12, 10_000, processes)
    images = [Pixels.whole(pixels(number), number) for number in range(1, 9)]
    images += [Image.fromarray(pixels(9)), Image.fromarray(pixels(10, 1, 1))]
    for number, image in enumerate(images, 1):
        assert kept.get(number) is None
        kept.add(number, image)
    assert all(same(kept.get(number), image) for number, image in enumerate(images, 1))
    assert kept.get(0) is None
    assert images[4].size == (5, 6)  # a file that lies on its side
    assert images[3].size == (6, 5)


def test_what_a_fork_keeps_all_the_others_have():
    kept = Kept(100, 100 * 90, 2)

    def keep(start):
        for number in range(start, 100, 2):
            kept.add(number, Pixels.whole(pixels(number), 1))

    others = [FORK.Process(target=keep, args=(start,)) for start in (0, 1)]
    for each in others:
        each.start()
    for each in others:
        each.join()
    assert all(np.array_equal(kept.get(number).stored, pixels(number)) for number in range(100))
    seen = in_a_fork(lambda: os._exit(sum(kept.get(number) is not None for number in range(100))))
    assert seen == 100


@pytest.mark.parametrize("processes", [0, 2])
def test_no_more_than_the_room_is_taken(processes):
    kept = Kept(4, 200, processes)  # two images of 90 bytes
    for number in range(4):
        kept.add(number, Pixels.whole(pixels(number), 1))
    assert [kept.get(number) is not None for number in range(4)] == [True, True, False, False]
    assert kept.fits(1, 6)
    assert not kept.fits(1, 7)


def test_an_image_that_two_processes_read_is_kept_once():
    kept = Kept(2, 200, 2)
    in_a_fork(lambda: kept.add(0, Pixels.whole(pixels(0), 1)))
    kept.add(0, Pixels.whole(pixels(0), 1))
    kept.add(1, Pixels.whole(pixels(1), 1))  # there is still room
    assert np.array_equal(kept.get(1).stored, pixels(1))


def test_a_process_that_is_killed_while_it_keeps_an_image_stops_no_other():
    kept = Kept(2, 1000, 2)

    def killed():
        with kept.shared._locked():
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_fork(killed) == -signal.SIGKILL
    kept.add(1, Pixels.whole(pixels(1), 1))
    assert np.array_equal(kept.get(1).stored, pixels(1))


def test_a_copy_in_a_process_that_is_no_fork_begins_empty_with_its_part_of_the_room():
    kept = Kept(3, 400, 2)
    kept.add(0, Pixels.whole(pixels(0), 1))
    copy = pickle.loads(pickle.dumps(kept))
    assert copy.get(0) is None
    copy.add(1, Pixels.whole(pixels(1), 1))
    copy.add(2, Pixels.whole(pixels(2), 1))
    assert np.array_equal(copy.get(1).stored, pixels(1))
    copy.add(0, Pixels.whole(pixels(0, 7, 5), 1))
    assert copy.get(0) is None


def test_asking_how_processes_start_leaves_the_choice_to_the_program():
    def chooses():
        multiprocessing.set_start_method(None, force=True)
        Kept(1, 100, 1)
        multiprocessing.set_start_method("spawn")
        os._exit(0 if Kept(1, 100, 1).shared is None else 1)

    assert in_a_fork(chooses) == 0
