"""Losses that several of the literature's methods share."""

from torch import Tensor


def flow_cross_entropy(source: Tensor, destination: Tensor, flow: Tensor) -> Tensor:
    """−Σ_ij m_ij (log p(j | i) + log p(i | j)): how well embeddings tell where trips go and come from.

    p(j | i) = softmax_j(s_i·d_j) and p(i | j) = softmax_i(d_j·s_i), as in MVURE and HREP. HREP's code weighs
    log p(i | j) by m_ji: a transpose is missing there.

    *Shape:* source (N, D), destination (N, D), flow (N, N) → scalar
    """
    product = source @ destination.T
    return -(flow * (product.log_softmax(dim=1) + product.log_softmax(dim=0))).sum()
