"""Which tests of the products' contract a program over raw pointers goes through, as (name, arguments)."""

from support import cases
from support.cases import DTYPES, HALVES

PRODUCT = (
    ("test_every_shape",),
    *(("test_every_layout", dtype) for dtype in DTYPES),
    *(("test_long_depth_and_a_mean", codebook) for codebook in ("nf4", "fp4", "custom")),
    *(("test_unbiased", codebook) for codebook in ("nf4", "int4", "af4")),
    *(("test_scales_far_apart", zeros) for zeros in (True, False)),
    ("test_blocks_that_share_a_scale", "one", "nf4"),
    ("test_one_hot_input_reads_the_weight",),
    ("test_fp32_is_true_fp32",),
    *(("test_accumulates_in_fp32", dtype) for dtype in HALVES),
    *(("test_lora_of_every_rank", r) for r in (1, 5, 16, 17, 40)),
    *(("test_lora_is_rounded_once_with_the_product", dtype) for dtype in HALVES),
    ("test_scaling", 0.0),
    ("test_a_factor_of_zeros_changes_no_bit",),
    ("test_a_nan_in_the_factor_reaches_its_column_only",),
    ("test_a_row_does_not_see_the_others",),
    ("test_nan_and_inf_reach_their_row",),
    ("test_a_nan_block_reaches_its_columns_only",),
    ("test_a_level_that_is_nan_is_only_seen_where_it_is_used",),
    ("test_bits_depend_on_no_schedule",),
    *(("test_empty", shape) for shape in cases.EMPTY_SHAPES),
)
GROUPED = (
    *(("test_every_kernel", counts) for counts in ((0, 3, 0, 17, 8, 0), (5, 2, 64), (0, 0))),
    *(("test_a_long_depth_and_a_mean", 1.0, dtype) for dtype in DTYPES),
    ("test_the_bits_of_the_product_of_each_expert",),
    ("test_a_nan_block_stays_with_its_expert",),
)


def case_id(case) -> str:
    return "-".join(map(str, case))
