"""Sizes that arrays are padded to, so few programs are compiled."""


def bucket(size: int, least: int) -> int:
    """The smallest of least x 1, 1.5, 2, 3, 4, 6, 8, ... that is at least `size`; `least` must be even, or 1."""
    power = least
    while power < size:
        if 2 * size <= 3 * power:
            return 3 * power // 2
        power *= 2
    return power


def bucket_of(size: int, buckets: tuple[int, ...]) -> int:
    """The smallest of the ascending `buckets` that is at least `size`."""
    return next(each for each in buckets if each >= size)


def powers_of_two(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... below `most`, and `most`."""
    return (*(2**i for i in range((most - 1).bit_length())), most)


def cache_lengths(most: int) -> tuple[int, ...]:
    """Lengths of the part of a cache that a program reads: `most`, its half and so on, down to 256."""
    lengths = [most]
    while lengths[0] // 2 >= 256:
        lengths.insert(0, lengths[0] // 2)
    return tuple(lengths)
