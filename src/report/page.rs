//! The HTML page: its frame, its elements, and the only function that turns text into HTML.

use crate::log::chart::PALETTE;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use plotters::style::RGBColor;

/// A section of the page.
pub struct Section {
    /// Plain text; empty for a section without a heading.
    pub title: String,
    /// HTML.
    pub body: String,
}

/// Escapes text for HTML, between tags and inside double quotes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            _ => out.push(letter),
        }
    }
    out
}

/// Renders the whole document.
pub fn render(title: &str, sections: &[Section]) -> String {
    let title = escape(title);
    let mut body = String::new();
    for section in sections.iter().filter(|section| !section.body.is_empty()) {
        body += "<section>\n";
        if !section.title.is_empty() {
            body += &format!("<h2>{}</h2>\n", escape(&section.title));
        }
        body += &section.body;
        body += "</section>\n";
    }
    format!(
        r#"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}</main>
</body>
</html>
"#,
        include_str!("style.css")
    )
}

/// Renders a table whose cells are HTML. The first `name_columns` columns hold names, the others numbers.
pub fn table(head: &[String], rows: &[Vec<String>], name_columns: usize) -> String {
    let cells = |tag: &str, cells: &[String]| -> String {
        let class = |column: usize| if column < name_columns { "" } else { " class=\"figure\"" };
        cells.iter().enumerate().map(|(column, cell)| format!("<{tag}{}>{cell}</{tag}>", class(column))).collect()
    };
    let rows: String = rows.iter().map(|row| format!("<tr>{}</tr>\n", cells("td", row))).collect();
    let head = if head.is_empty() { String::new() } else { format!("<thead><tr>{}</tr></thead>\n", cells("th", head)) };
    format!("<div class=\"wide\"><table>\n{head}<tbody>\n{rows}</tbody></table></div>\n")
}

/// Renders an SVG with a label for screen readers and a caption.
pub fn figure(svg: &str, name: &str, caption: &str) -> String {
    let name = escape(name);
    let caption = escape(caption);
    let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{name}\" "), 1);
    format!("<figure>{svg}<figcaption>{caption}</figcaption></figure>\n")
}

/// Renders an embedded PNG file.
pub fn image(name: &str, png: &[u8]) -> String {
    let name = escape(name);
    let data = STANDARD.encode(png);
    format!(
        "<figure><img alt=\"{name}\" src=\"data:image/png;base64,{data}\"><figcaption>{name}</figcaption></figure>\n"
    )
}

/// Renders a square in the color with this index in the palette.
pub fn swatch(index: usize) -> String {
    format!("<span class=\"swatch\" style=\"{}\"></span>", background(index))
}

/// Renders the legend of a chart.
pub fn legend(names: &[&str]) -> String {
    let entry = |(index, name): (usize, &&str)| format!("<li>{}{}</li>", swatch(index), escape(name));
    format!("<ul class=\"legend\">{}</ul>\n", names.iter().enumerate().map(entry).collect::<String>())
}

/// Renders a fraction from 0 to 1 as a bar with its percentage; a value outside of that range has no bar.
pub fn bar(fraction: f64, color: usize) -> String {
    if !(0.0..=1.0).contains(&fraction) {
        return "not known".into();
    }
    let percent = fraction * 100.0;
    let background = background(color);
    format!("<span class=\"bar\"><span style=\"width:{percent:.1}%;{background}\"></span></span> {percent:.1} %")
}

/// Returns the CSS of a background in a color of the palette, which repeats.
fn background(index: usize) -> String {
    let RGBColor(red, green, blue) = PALETTE[index % PALETTE.len()];
    format!("background:#{red:02x}{green:02x}{blue:02x}")
}
