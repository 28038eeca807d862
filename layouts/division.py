"""Time division (Covo-Audio-FD): each frame as two columns of the grid, what is said and what is heard.

    text             it    ·  is    · noon   ·         native          it  is  noon
    speak semantic   31    -  32    -  33    -                         31  32  33
    listen semantic   -   11   -   12   -   13                         11  12  13

The column of what is heard predicts the next frame, as in the native grid the column of both does; from the
other nothing is learned. Covo-Audio's chunk is 160 ms long (1:4): one position of features of what is heard,
a text token, and four codes of a single 25 Hz codebook, each predicted from those before it. Here a chunk is
one frame, and the depth transformer writes its eight codes; only the order of reading is compared.
"""
import torch

from streams import LISTEN, SPEAK, TEXT


def divide(grid, learn, loss, v):
    """A batch as train.Conversations makes it, (B, 17, T), (B, T-1) and (B, 9, T-1), with two columns for
    each frame: (B, 17, 2*T), (B, 2*T-1) and (B, 9, 2*T-1)."""
    said, heard = halves(grid, v)
    after = lambda x: torch.stack([torch.zeros_like(x), x], -1).flatten(-2)  # only what is heard predicts
    last = lambda x: torch.cat([after(x), torch.zeros_like(x[..., :1])], -1)
    return torch.stack([said, heard], -1).flatten(-2), last(learn), last(loss)


def halves(grid, v):
    """Columns (B, 17, ...) -> what is said in them, what is heard in them."""
    said, heard = grid.clone(), grid.clone()
    said[:, LISTEN] = heard[:, SPEAK] = v.empty
    heard[:, TEXT] = v.wait
    return said, heard
