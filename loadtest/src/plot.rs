//! A plot of samples: one row of dots for each kind of request, on a logarithmic scale.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const WIDTH: u32 = 900;
const ROW_HEIGHT: u32 = 110;
/// Title, axis and margins.
const AROUND: u32 = 110;
const COLOURS: [RGBColor; 3] = [
    RGBColor(0x1f, 0x77, 0xb4),
    RGBColor(0x2c, 0xa0, 0x2c),
    RGBColor(0xd6, 0x27, 0x28),
];

/// An SVG of `rows`, each a name and samples in milliseconds. A bar marks each row's median.
pub fn strips(title: &str, rows: &[(&str, &[f64])]) -> Result<String> {
    let mut svg = String::new();
    draw(&mut svg, title, rows).map_err(|error| anyhow!("cannot draw the plot: {error}"))?;
    Ok(svg)
}

fn draw(
    svg: &mut String,
    title: &str,
    rows: &[(&str, &[f64])],
) -> Result<(), Box<dyn std::error::Error>> {
    let height = AROUND + ROW_HEIGHT * rows.len() as u32;
    let root = SVGBackend::with_string(svg, (WIDTH, height)).into_drawing_area();
    root.fill(&WHITE)?;
    let samples = rows.iter().flat_map(|(_, samples)| samples.iter().copied());
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(40)
        .y_label_area_size(0)
        .build_cartesian_2d(scale(samples).log_scale(), 0.0..rows.len() as f64)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc("milliseconds")
        .x_label_formatter(&|ms| {
            if *ms < 1.0 {
                format!("{ms:.1}")
            } else {
                format!("{ms:.0}")
            }
        })
        .label_style(("sans-serif", 14))
        .draw()?;
    let left = chart.x_range().start;
    for (n, (name, samples)) in rows.iter().enumerate() {
        let colour = COLOURS[n % COLOURS.len()];
        let middle = (rows.len() - n) as f64 - 0.55;
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len().saturating_sub(1) / 2).copied();
        let label = match median {
            Some(median) => format!("{name}: median {} ms", crate::report::millis(median)),
            None => format!("{name}: no samples"),
        };
        let style = ("sans-serif", 16).into_font().color(&colour);
        chart.draw_series([Text::new(label, (left * 1.02, middle + 0.45), style)])?;
        chart.draw_series(
            samples.iter().enumerate().map(|(n, &ms)| {
                Circle::new((ms, middle + jitter(n)), 4, colour.mix(0.45).filled())
            }),
        )?;
        if let Some(median) = median {
            let bar = [(median, middle - 0.3), (median, middle + 0.3)];
            chart.draw_series([PathElement::new(bar, colour.stroke_width(3))])?;
        }
    }
    root.present()?;
    Ok(())
}

/// From a bit below the smallest sample to a bit above the largest; at least a factor of ten.
fn scale(samples: impl Iterator<Item = f64>) -> Range<f64> {
    const SMALLEST: f64 = 0.01; // a logarithm needs something above nothing
    let (least, most) = samples.fold((f64::MAX, SMALLEST), |(least, most), sample| {
        (least.min(sample.max(SMALLEST)), most.max(sample))
    });
    let least = least.min(most) / 1.5;
    least..(most * 1.5).max(least * 10.0)
}

/// Spreads dots that would cover each other, the same way every time.
fn jitter(n: usize) -> f64 {
    const GOLDEN: f64 = 0.618_033_988_749_895;
    ((n as f64 * GOLDEN).fract() - 0.5) * 0.4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_a_dot() {
        let svg = strips(
            "times",
            &[("a", &[1.0, 2.0, 300.0]), ("b", &[0.0]), ("c", &[])],
        )
        .unwrap();
        assert_eq!(svg.matches("<circle").count(), 4);
        for text in [
            "times",
            "a: median 2.00 ms",
            "b: median 0.00 ms",
            "c: no samples",
        ] {
            assert!(svg.contains(text), "{text}");
        }
    }

    #[test]
    fn the_scale_holds_all_samples() {
        for samples in [&[][..], &[0.0], &[5.0], &[1.0, 1e6]] {
            let range = scale(samples.iter().copied());
            assert!(
                range.start > 0.0 && range.end >= range.start * 9.99,
                "{range:?}"
            );
            assert!(
                samples
                    .iter()
                    .all(|&sample| range.contains(&sample.max(range.start)))
            );
        }
    }
}
