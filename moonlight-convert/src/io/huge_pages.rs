//! Memory for a parameter.

/// Zeros. The system clears pages when they are first touched, and is asked for large ones: it takes an eighth of the time
/// to fault a large tensor in by 2 MiB than by 4 KiB.
pub(crate) fn zeros<T: bytemuck::Zeroable>(count: usize) -> Vec<T> {
    let mut values = bytemuck::zeroed_vec(count);
    ask_for_huge_pages(&mut values);
    values
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(values: &mut [T]) {
    /// That of x86-64 and of ARM with pages of 4 KiB.
    const HUGE_PAGE: usize = 2 << 20;
    let start = values.as_mut_ptr().cast::<u8>();
    // Only pages that hold nothing else.
    let skipped = start.align_offset(HUGE_PAGE);
    let length = size_of_val(values).saturating_sub(skipped) / HUGE_PAGE * HUGE_PAGE;
    if length > 0 {
        // SAFETY: the range lies inside the values, and the advice changes nothing that is in it. That it is refused costs
        // only speed.
        let _ = unsafe { libc::madvise(start.add(skipped).cast(), length, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_values: &mut [T]) {}
