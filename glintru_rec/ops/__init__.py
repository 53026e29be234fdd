"""Operators on ragged batches: one file per op, each with a naive truth beside its torch path.

Those that `torch.compile` must not look into are registered with `torch.library` under the namespace ``glintru_rec``. A
forward op gives its results and what its backward op is handed back; every tensor is contiguous and of one floating dtype,
``offsets`` is int64 ``[B + 1]``, and T, B and any length may be 0. Gradients of results that nobody used come as zeros.

============================= =========================================================== ====================================
op                            inputs                                                      results
============================= =========================================================== ====================================
``gru_forward``               gates [T, 3D], weight [3D, D], initial [B, D], offsets,     hidden [T, D], last [B, D],
                              save: bool                                                  saved [T, 4D] ([0, 4D] if not save)
``gru_backward``              grad_hidden [T, D], grad_last [B, D], weight, initial,      grad_gates, grad_weight,
                              offsets, hidden, saved                                      grad_initial
``scan_forward``              inputs [T, 2, S], decay [2, S], initial [B, 2, S], offsets  states [T, 2, S], last [B, 2, S]
``scan_backward``             grad_states, grad_last, decay, initial, offsets, states     grad_inputs, grad_decay, grad_initial
``attention_forward``         q, k [T, H, d], v [T, H, e], initial [B, H, d, e],          out [T, H, e], last [B, H, d, e]
                              offsets, causal: bool
``attention_backward``        grad_out, grad_last, q, k, v, initial, offsets, causal      grad_q, grad_k, grad_v, grad_initial
``normalized_forward``        q, k, q_rotary, k_rotary [T, H, d], v [T, H, e],            out [T, H, e], last_memory
                              memory [B, H, d, e], key_sums [B, H, d], offsets,           [B, H, d, e], last_key_sums
                              causal: bool, eps: float                                    [B, H, d], weights [T, H]
``normalized_backward``       grad_out, grad_last_memory, grad_last_key_sums, q, k,       grad_q, grad_k, grad_q_rotary,
                              q_rotary, k_rotary, v, memory, key_sums, offsets, out,      grad_k_rotary, grad_v, grad_memory,
                              weights, causal                                             grad_key_sums
``conv_forward``              x [T, D_in], weight [D_out, D_in, k] or [D_in, 1, k],       out [T, D_out]
                              bias [D_out], offsets, causal: bool
``conv_backward``             grad_out, x, weight, offsets, causal                        grad_x, grad_weight, grad_bias
``selective_gru_forward``     u [T, D], weights (12 tensors), initial [B, D], offsets,    out [T, D], last [B, D], c [T, D],
                              kept [T, D] or None, rate: float, save: bool                g [T, D], hidden [T, D], scan [T, 4D]
                                                                                          (of no items if not save)
``selective_gru_backward``    grad_out, grad_last, u, weights, initial, offsets, kept,    grad_u, grad_weights, grad_initial
                              rate, saved ([c, g, hidden, scan])
============================= =========================================================== ====================================

``saved`` of the GRU holds what the implementation wants, in an order of its own: the same implementation reads it.
``weights`` are the divisors q · Σ k + ε of each item and head. Where no state is kept, the attentions' ops take ``[0, ...]`` as
the initial one and give as much as the last; kernels always get and give all B. Each op ends with ``implementation`` (see
`glintru_rec.ops.implementation`), the attentions' before it with ``chunk_size``, which no kernel gets. Kernels for ``gru``,
``scan``, ``conv``, ``attention`` and ``normalized`` are in ``triton_gru.py`` and so on, as plain functions ``forward`` and
``backward`` with the arguments above, in this order, and these results; those of ``conv`` are causal. Those of
``selective_gru`` get its weights by name; its operators run nothing but kernels, since its torch code composes the operators of
the parts, and take no ``implementation``. ``random_bits``, ``rotate`` and ``softmax_attention`` have no kernels.
"""
