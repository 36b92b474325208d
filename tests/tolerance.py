"""What error is allowed, derived and never tuned.

Inputs are quantised to the dtype under test first and the truth is float64 of those values. An output may err by twice
what plain torch errs with float32 accumulation on the same values, plus 4 eps of the accumulator or output dtype,
whichever is coarser, times |truth|. Gradients are compared row by row in norm with the chosen token's column apart, and
elementwise where they are not tiny beside their row.
"""

import torch


def eps(*dtypes):
    """The coarsest machine epsilon among floating dtypes."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def check(name, got, truth, plain, *dtypes):
    """Assert that |got - truth| <= 2 max |plain - truth| + 4 eps |truth|, NaN and inf in the same places."""
    got, truth, plain = got.double(), truth.double(), plain.double()
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    assert torch.equal(got[~finite].nan_to_num(9.0, 8.0, 7.0), truth[~finite].nan_to_num(9.0, 8.0, 7.0)), (
        f"{name}: NaN or inf in other places than the truth"
    )
    got, truth, plain = got[finite], truth[finite], plain[finite]
    if truth.numel() == 0:
        return
    error = (got - truth).abs()
    plain_error = (plain - truth).abs()
    allowed = 2 * plain_error[plain_error.isfinite()].max() + 4 * eps(*dtypes) * truth.abs()
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: error {error[worst]:.3e} where {allowed[worst]:.3e} is allowed (truth {truth[worst]:.6g})"
    )


def check_rows(name, got, truth, plain, *dtypes, ids=None):
    """Assert closeness of gradients (N, V) row by row: the error's norm within 2x plain's + 4 eps of the row's norm.

    With `ids` these are gradients of logits: the chosen token's column is compared apart, so that its large entry
    cannot hide the others, and elements are compared too. An element of a product is a sum that may cancel: rows only.
    """
    got, truth, plain = (t.double().reshape(-1, t.shape[-1]) for t in (got, truth, plain))
    if ids is not None:
        at = ids.reshape(-1, 1)
        check(f"{name} of the chosen token", *(t.gather(1, at) for t in (got, truth, plain)), *dtypes)
        got, truth, plain = (t.scatter(1, at, 0.0) for t in (got, truth, plain))
    assert got.isfinite().all(), f"{name}: a gradient is not finite"
    error, plain_error, size = ((t).norm(dim=1) for t in (got - truth, plain - truth, truth))
    allowed = 2 * plain_error.max() + 4 * eps(*dtypes) * size
    worst = (error - allowed).argmax()
    assert (error <= allowed).all(), (
        f"{name}: row {worst} errs by {error[worst]:.3e} in norm where {allowed[worst]:.3e} is allowed"
    )
    if ids is None:
        return
    large = truth.abs() > 1e-3 * truth.abs().amax(dim=1, keepdim=True)
    elementwise = (got - truth).abs()[large] / truth.abs()[large]
    plainly = ((plain - truth).abs()[large] / truth.abs()[large]).amax() if large.any() else torch.tensor(0.0)
    if large.any():
        limit = 2 * plainly + 4 * eps(*dtypes)
        assert elementwise.max() <= limit, f"{name}: relative error {elementwise.max():.3e}, allowed {limit:.3e}"
