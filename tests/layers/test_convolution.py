"""The short convolution against PyTorch's, in one call, in pieces, padded and packed."""

import itertools

import torch
from torch.nn import functional as F

from mnemon.layers.convolution import ShortConvolution

CHANNELS = 5


def convolution(size: int = 4) -> ShortConvolution:
    torch.manual_seed(0)
    made = ShortConvolution(CHANNELS, size, bias=True).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_a_causal_depthwise_convolution() -> None:
    for size in (1, 2, 4):
        conv, x = convolution(size), random(2, 9, CHANNELS)
        y, tail = conv(x, torch.zeros(2, size - 1, CHANNELS, dtype=torch.float64))
        padded = F.pad(x.mT, (size - 1, 0))
        expected = F.conv1d(padded, conv.weight[:, None], conv.bias, groups=CHANNELS).mT
        torch.testing.assert_close(y, expected)
        assert torch.equal(tail, x[:, 9 - (size - 1) :])


def test_the_tail_continues_pieces_shorter_than_the_convolution() -> None:
    conv, x = convolution(), random(2, 9, CHANNELS)
    tail = start = random(2, 3, CHANNELS, seed=1)
    pieces = []
    for piece in x.tensor_split([1, 3, 3, 8], dim=1):
        y, tail = conv(piece, tail)
        pieces.append(y)
    expected, end = conv(x, start)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    assert torch.equal(tail, end)


def test_the_tail_ends_where_each_row_ends() -> None:
    conv, x, start = convolution(), random(3, 6, CHANNELS), random(3, 3, CHANNELS, seed=1)
    lengths = torch.tensor([0, 2, 6])
    _, tail = conv(x, start, lengths)
    for row, length in enumerate(lengths.tolist()):
        expected = torch.cat([start[row], x[row, :length]])[-3:]
        assert torch.equal(tail[row], expected)


def test_packed_sequences_continue_from_their_own_tails() -> None:
    conv, bounds = convolution(), [0, 1, 1, 6, 8]
    x, start = random(1, 8, CHANNELS), random(4, 3, CHANNELS, seed=1)
    y, tail = conv.packed(x, start, torch.tensor(bounds))
    for row, (begin, stop) in enumerate(itertools.pairwise(bounds)):
        expected, end = conv(x[:, begin:stop], start[row : row + 1])
        torch.testing.assert_close(y[:, begin:stop], expected)
        assert torch.equal(tail[row], end[0])


def test_packed_sequences_may_all_be_empty() -> None:
    conv, start = convolution(), random(2, 3, CHANNELS)
    y, tail = conv.packed(random(1, 0, CHANNELS), start, torch.tensor([0, 0, 0]))
    assert y.shape == (1, 0, CHANNELS)
    assert torch.equal(tail, start)
