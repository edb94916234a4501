"""The suites, by name."""

from benchmarks.suites import (
    dispatch,
    draft_extend,
    functions,
    incremental,
    modes,
    prefill,
    prefix_sum,
    roofline,
    scale,
    schedules,
    sparse_attention,
    torch_handoff,
)

SUITES = {
    suite.name: suite
    for suite in (
        modes.SUITE,
        draft_extend.SUITE,
        prefix_sum.SUITE,
        prefill.SUITE,
        schedules.SUITE,
        roofline.SUITE,
        roofline.PAGES_SUITE,
        functions.SUITE,
        dispatch.SUITE,
        torch_handoff.SUITE,
        incremental.SUITE,
        sparse_attention.SUITE,
        scale.SUITE,
    )
}
