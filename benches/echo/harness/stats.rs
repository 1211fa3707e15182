//! The few statistics the verdicts rest on. Knows numbers, nothing of contenders or cells.

/// The smallest value: what the machine can do when nothing else interferes.
pub fn minimum(values: &[f64]) -> Option<f64> {
    values.iter().copied().reduce(f64::min)
}

/// The middle value, or the mean of the two middle ones.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// One contender against another, by three statistics of values that were taken in pairs; under 1 the first needs less.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ratio {
    /// The smallest of the first's values over the smallest of the second's, whenever that was.
    pub minimum: f64,
    /// The median of the pairs' ratios, of those pairs that were taken while the machine was calm.
    pub calm: f64,
    /// The median of all pairs' ratios.
    pub median: f64,
    /// By how much that median may be off by chance, as a share of it ([`standard_error`]); 0 of a single pair.
    pub error: f64,
}

/// The ratio of `first` to `second`, each a value per pass (of the same passes, by index), of which `calm` names some; `None`
/// without a pass of both.
pub fn ratio(first: &[f64], second: &[f64], calm: &[usize]) -> Option<Ratio> {
    let within: Vec<f64> = first.iter().zip(second).map(|(a, b)| a / b).collect();
    let chosen: Vec<f64> = (calm.iter())
        .filter_map(|&pass| within.get(pass).copied())
        .collect();
    let median = median(&within)?;
    Some(Ratio {
        minimum: minimum(first)? / minimum(second)?,
        calm: self::median(&chosen).unwrap_or(median),
        median,
        error: standard_error(&within) / median,
    })
}

/// The standard error of the median of `values`, whatever their distribution: the values half the root of their number to either
/// side of the middle have it between them two times in three.
pub fn standard_error(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let (middle, aside) = (last as f64 / 2.0, (sorted.len() as f64).sqrt() / 2.0);
    let at = |place: f64| sorted[(place.round().max(0.0) as usize).min(last)];
    (at(middle + aside) - at(middle - aside)) / 2.0
}

/// The passes in which the machine was fastest, half of them (and one at least), given each contender's value in each pass. Those in
/// which not all took part do not count.
///
/// How fast the machine was in a pass is the median over the contenders of what they needed in it, each against its own
/// median: all of them choose, so that the choice favours nobody, which a minimum of each one's own does with whoever was lucky.
pub fn calm(contenders: &[Vec<f64>]) -> Vec<usize> {
    let usual: Vec<(&Vec<f64>, f64)> = (contenders.iter())
        .filter_map(|values| Some((values, median(values)?)))
        .collect();
    let passes = usual.iter().map(|(values, _)| values.len()).min();
    let mut levels: Vec<(f64, usize)> = (0..passes.unwrap_or(0))
        .map(|pass| {
            let of_all: Vec<f64> = (usual.iter())
                .map(|(values, usual)| values[pass] / usual)
                .collect();
            (median(&of_all).unwrap_or(f64::INFINITY), pass)
        })
        .collect();
    levels.sort_by(|a, b| a.0.total_cmp(&b.0));
    levels.truncate(levels.len().div_ceil(2));
    levels.into_iter().map(|(_, pass)| pass).collect()
}

/// How far a ratio may be off by chance, by the two statistics that judge.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tolerance {
    pub calm: f64,
    pub median: f64,
}

/// The distance from 1 at which a ratio r and its reciprocal are alike: r - 1 for a loss, 1/r - 1 for a win.
pub fn deviation(ratio: f64) -> f64 {
    ratio.max(1.0 / ratio) - 1.0
}

/// The tolerance of each cell, given each cell's ratio of a contender to itself.
///
/// A cell's is what its own two rows differ by, and at least the median over the cells: that two rows once come out alike is luck
/// and no precision. Noise elsewhere does not excuse a quiet cell, which a maximum over all of them would.
pub fn tolerances(against_itself: &[Option<Ratio>]) -> Vec<Tolerance> {
    let of = |pick: fn(&Ratio) -> f64| {
        let own: Vec<Option<f64>> = (against_itself.iter())
            .map(|ratio| ratio.as_ref().map(|ratio| deviation(pick(ratio))))
            .collect();
        let known: Vec<f64> = own.iter().flatten().copied().collect();
        let least = median(&known).unwrap_or(0.0);
        own.into_iter()
            .map(|own| own.unwrap_or(least).max(least))
            .collect::<Vec<f64>>()
    };
    let calm = of(|ratio| ratio.calm);
    let medians = of(|ratio| ratio.median);
    (calm.into_iter().zip(medians))
        .map(|(calm, median)| Tolerance { calm, median })
        .collect()
}

/// What came of a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// At or below the limit.
    Reached,
    /// Above the limit by no more than the tolerance.
    Within,
    /// Above the limit by more than chance explains.
    Missed,
}

/// Judges `value` against `limit`, of which `tolerance` is a share.
pub fn judge(value: f64, limit: f64, tolerance: f64) -> Verdict {
    if value <= limit {
        Verdict::Reached
    } else if value <= limit + tolerance {
        Verdict::Within
    } else {
        Verdict::Missed
    }
}

#[cfg(test)]
mod tests {
    // A bench is built with cfg(test) but without its tests, which `tests/echo_bench.rs` runs.
    #[allow(unused_imports)]
    use super::*;

    #[test]
    fn median_is_the_middle_or_the_mean_of_the_middle_two() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[9.0, 1.0, 2.0, 4.0]), Some(3.0));
        assert_eq!(minimum(&[9.0, 1.0, 2.0]), Some(1.0));
        assert_eq!(minimum(&[]), None);
    }

    #[test]
    fn a_ratio_s_median_compares_neighbours_in_time() {
        // The machine is twice as slow in the second pass; the first contender always needs half as much.
        let ratio = ratio(&[10.0, 21.0, 10.0], &[20.0, 42.0, 16.0], &[2]).unwrap();
        assert_eq!(ratio.minimum, 10.0 / 16.0);
        assert_eq!(ratio.median, 0.5);
        assert_eq!(ratio.calm, 10.0 / 16.0);
        assert_eq!(super::ratio(&[], &[1.0], &[]), None);
    }

    #[test]
    fn a_median_s_error_is_of_the_values_around_it() {
        let values: Vec<f64> = (0..101).map(f64::from).collect();
        // The middle is 50, the root of 101 is about 10.
        assert_eq!(standard_error(&values), 5.0);
        let far: Vec<f64> = values.iter().map(|value| value.powi(9)).collect();
        let around = (55f64.powi(9) - 45f64.powi(9)) / 2.0;
        assert_eq!(standard_error(&far), around);
        assert_eq!(standard_error(&[3.0]), 0.0);
        assert_eq!(standard_error(&[]), 0.0);
    }

    #[test]
    fn the_calm_passes_are_those_in_which_all_were_fast() {
        let contenders = [
            vec![10.0, 14.0, 9.0, 14.0, 10.0, 14.0, 13.0, 14.0],
            vec![70.0, 100.0, 90.0, 110.0, 71.0, 100.0, 99.0, 100.0],
            // Lucky when the others were not.
            vec![30.0, 3.0, 40.0, 41.0, 32.0, 40.0, 42.0, 43.0],
        ];
        assert_eq!(calm(&contenders), [0, 4, 2, 6]);
        assert_eq!(calm(&contenders[..1]), [2, 0, 4, 6]);
        assert_eq!(calm(&[vec![1.0], vec![2.0, 1.0, 1.0]]), [0]);
        assert_eq!(calm(&[]), [0usize; 0]);
    }

    #[test]
    fn deviation_is_alike_for_a_loss_and_the_same_win() {
        assert_eq!(deviation(1.0), 0.0);
        assert_eq!(deviation(1.25), 0.25);
        assert_eq!(deviation(0.8), 0.25);
    }

    #[test]
    fn a_cell_s_tolerance_is_its_own_and_at_least_the_median() {
        let with = |calm, median| {
            Some(Ratio {
                minimum: 1.0,
                calm,
                median,
                error: 0.0,
            })
        };
        let cells = [
            with(1.0, 1.5),
            with(1.25, 1.0),
            with(0.5, 1.25),
            None,
            with(1.125, 1.125),
        ];
        let found = tolerances(&cells);
        let calm: Vec<f64> = found.iter().map(|each| each.calm).collect();
        assert_eq!(calm, [0.1875, 0.25, 1.0, 0.1875, 0.1875]);
        let medians: Vec<f64> = found.iter().map(|each| each.median).collect();
        assert_eq!(medians, [0.5, 0.1875, 0.25, 0.1875, 0.1875]);
    }

    #[test]
    fn a_limit_is_reached_missed_or_undecided() {
        assert_eq!(judge(1.0, 1.0, 0.0), Verdict::Reached);
        assert_eq!(judge(1.01, 1.0, 0.02), Verdict::Within);
        assert_eq!(judge(1.03, 1.0, 0.02), Verdict::Missed);
    }
}
