//! The table as a picture: a bar for each load, by good answers a second.

use std::fmt::Write;

use keelson_e2e::{Result, assets, pki};

use super::loads::Row;

const LINE: f64 = 24.0;
const LABELS: f64 = 300.0;
const BARS: f64 = 460.0;
const FIGURES: f64 = 90.0;
const TOP: f64 = 44.0;

pub(super) fn save(rows: &[Row]) -> Result<()> {
    let path = assets::target_folder().join("bench/server.svg");
    pki::write_file(&path, &svg(rows))?;
    println!("written to {}", path.display());
    Ok(())
}

fn svg(rows: &[Row]) -> String {
    let most = rows.iter().map(|row| row.good_per_second).fold(1.0, f64::max);
    let (width, mut y) = (LABELS + BARS + FIGURES, TOP);
    let mut bars = String::new();
    for row in rows {
        let long = row.good_per_second / most * BARS;
        let (text_y, end) = (y + LINE * 0.65, LABELS + long);
        let label = format!("{}, {} connections", escaped(&row.load), row.connections);
        // Writing into a string cannot fail.
        let _ = writeln!(
            bars,
            r##"<text x="{x:.0}" y="{text_y:.0}" text-anchor="end">{label}</text><rect x="{LABELS}" y="{top:.0}" width="{long:.0}" height="{high:.0}" fill="#3b6ea5"/><text x="{after:.0}" y="{text_y:.0}">{rate:.0}</text>"##,
            x = LABELS - 8.0,
            top = y + 3.0,
            high = LINE - 6.0,
            after = end + 6.0,
            rate = row.good_per_second,
        );
        y += LINE;
    }
    let height = y + 12.0;
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0}" height="{height:.0}" viewBox="0 0 {width:.0} {height:.0}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#fff"/>
<text x="12" y="26" font-size="15">kms-server on SoftHSM2: good answers a second, load generator on the same processors</text>
{bars}</svg>
"##
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::super::loads::{Load, Measured, Measurements};
    use super::*;

    #[test]
    fn the_longest_bar_fills_its_place_and_the_others_are_in_proportion() {
        let rate = |rate| vec![Measured { good_per_second: rate, ..Measured::default() }];
        let measured =
            Measurements([(Load::PEAK, rate(4000.0)), (Load::NOOP, rate(8000.0))].into());
        let picture = svg(&measured.rows());
        assert!(picture.contains(r#"width="460""#), "{picture}");
        assert!(picture.contains(r#"width="230""#), "{picture}");
        assert!(picture.contains("authenticated no-op, 32 connections"), "{picture}");
    }
}
