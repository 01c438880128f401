"""What a pure step offers beyond training one model: many models in one step, derivatives, curvature."""

from nanochat.train.functional.curvature import Spectrum, hutchinson, hvp, inverse_root, lanczos, ravel
from nanochat.train.functional.custom_backward import with_visible_backward
from nanochat.train.functional.members import (
    choose_chunk_size,
    fold_members,
    frozen,
    init_members,
    make_members_loss,
    make_members_step,
    select,
    stack,
    stack_hparams,
)
from nanochat.train.functional.unroll import unroll
