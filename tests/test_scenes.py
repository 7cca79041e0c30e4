"""The rendered data set."""

import scenes


def test_a_scene_follows_from_split_and_index_alone():
    keys = [(split, index) for split in ("train", "val") for index in range(4)]
    for part in (0, 1):  # image, label map
        pictures, again = ([scenes.render(*key, (32, 48))[part].tobytes() for key in order] for order in (keys, keys[::-1]))
        assert len(set(pictures)) == 8 and again == pictures[::-1]
