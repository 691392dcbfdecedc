"""One file a claim: statement, idea of the proof, what is measured, the bound, a negative control."""

from curvlab.theory.anisotropy import ekfac_is_never_sharper, few_directions_hold_the_energy, spectra_are_right
from curvlab.theory.bregman import (
    loss_difference_is_linear,
    remainder_in_a_linear_region,
    remainder_order,
)
from curvlab.theory.budget import budget_in_measured_nats, correct_epsilon, learning_at_equal_kl
from curvlab.theory.check import Case, Check, Claim, Findings
from curvlab.theory.constrained import confining_is_nearest, random_problem
from curvlab.theory.coupling import coupling_is_bounded, layers_do_not_interact
from curvlab.theory.divergence import bregman_is_kl
from curvlab.theory.exactness import (
    ekfac_best_diagonal,
    kfac_exact_independent,
    kfac_exact_one_example,
    kfac_exact_shared_curvature,
    kfac_with_shared_weights,
)
from curvlab.theory.fisher import (
    empirical_fisher_differs,
    fisher_is_gauss_newton,
    sampled_fisher_converges,
    sampled_fisher_is_unbiased,
)
from curvlab.theory.fitted_targets import on_fitted_targets, while_fitting_targets
from curvlab.theory.geometry import two_parameter_slice
from curvlab.theory.guarantee import own_curvature_bound
from curvlab.theory.guarantee_in_ggn import bound_exceeded_in_the_ggn, bound_in_the_ggn
from curvlab.theory.kronecker import (
    cut_inside_an_eigenspace,
    kronecker_projection,
    kronecker_projection_of_large_layers,
    random_factor,
)
from curvlab.theory.layerwise import (
    curvatures_add_up_to_a_factor,
    exact_null_spaces_combine,
    layerwise_projection_keeps_more,
)
from curvlab.theory.mismatch import no_estimate_beats_the_whole_set, sample_is_as_good, samples_underestimate_boundedly
from curvlab.theory.nesting import approximate_null_spaces_nest, one_curvature_nests, overlap_is_the_share
from curvlab.theory.null_space import (
    inclusion_strict_or_equal,
    null_space_inclusion,
    unseen_updates_change_nothing,
)
from curvlab.theory.numerics import bfloat16_bases, eigenvalues_below_zero
from curvlab.theory.optimisers import descent_in_the_null_space, leaking_costs_curvature
from curvlab.theory.piecewise_linear import piecewise_linear_head, smooth_head
from curvlab.theory.prediction import prediction_along_edits, small_steps_are_predicted
from curvlab.theory.published import published_storage_figures
from curvlab.theory.quadratic import budget_beats_cut_in_its_own_model, projected_descent_on_a_quadratic
from curvlab.theory.sampling import differences_against_sampling_error
from curvlab.theory.sandwich import VARIANTS, sandwich, sandwich_breaks
from curvlab.theory.setting import LOSSES, Setting, random_setting
from curvlab.theory.storage import operations_of_a_projection, storage_of_a_projection
from curvlab.theory.summation import float32_energy, library_energy_is_exact
from curvlab.theory.tables import (
    degradation_below_one_percent,
    hundred_times_faster,
    review_quotes,
    robust_to_gamma,
    robust_to_sample_size,
    tops_editing,
)
from curvlab.theory.unlabelled import ignored_positions_count, labelled_inputs_suffice, padding_counts_nothing

__all__ = [
    "LOSSES",
    "VARIANTS",
    "Case",
    "Check",
    "Claim",
    "Findings",
    "Setting",
    "approximate_null_spaces_nest",
    "bfloat16_bases",
    "bound_exceeded_in_the_ggn",
    "bound_in_the_ggn",
    "bregman_is_kl",
    "budget_beats_cut_in_its_own_model",
    "budget_in_measured_nats",
    "confining_is_nearest",
    "correct_epsilon",
    "coupling_is_bounded",
    "curvatures_add_up_to_a_factor",
    "cut_inside_an_eigenspace",
    "degradation_below_one_percent",
    "descent_in_the_null_space",
    "differences_against_sampling_error",
    "eigenvalues_below_zero",
    "ekfac_best_diagonal",
    "ekfac_is_never_sharper",
    "empirical_fisher_differs",
    "exact_null_spaces_combine",
    "few_directions_hold_the_energy",
    "fisher_is_gauss_newton",
    "float32_energy",
    "hundred_times_faster",
    "ignored_positions_count",
    "inclusion_strict_or_equal",
    "kfac_exact_independent",
    "kfac_exact_one_example",
    "kfac_exact_shared_curvature",
    "kfac_with_shared_weights",
    "kronecker_projection",
    "kronecker_projection_of_large_layers",
    "labelled_inputs_suffice",
    "layers_do_not_interact",
    "layerwise_projection_keeps_more",
    "leaking_costs_curvature",
    "learning_at_equal_kl",
    "library_energy_is_exact",
    "loss_difference_is_linear",
    "no_estimate_beats_the_whole_set",
    "null_space_inclusion",
    "on_fitted_targets",
    "one_curvature_nests",
    "operations_of_a_projection",
    "overlap_is_the_share",
    "own_curvature_bound",
    "padding_counts_nothing",
    "piecewise_linear_head",
    "prediction_along_edits",
    "projected_descent_on_a_quadratic",
    "published_storage_figures",
    "random_factor",
    "random_problem",
    "random_setting",
    "remainder_in_a_linear_region",
    "remainder_order",
    "review_quotes",
    "robust_to_gamma",
    "robust_to_sample_size",
    "sample_is_as_good",
    "sampled_fisher_converges",
    "sampled_fisher_is_unbiased",
    "samples_underestimate_boundedly",
    "sandwich",
    "sandwich_breaks",
    "small_steps_are_predicted",
    "smooth_head",
    "spectra_are_right",
    "storage_of_a_projection",
    "tops_editing",
    "two_parameter_slice",
    "unseen_updates_change_nothing",
    "while_fitting_targets",
]  # fmt: skip
