//! The page: its frame, its small parts, and the one place where text becomes HTML.

use super::chart::PALETTE;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

/// A part of the page. `body` is HTML; the title is text, and none where it is empty.
pub struct Section {
    pub title: String,
    pub body: String,
}

/// Text as HTML, safe between tags and inside double quotes.
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

/// The whole document.
pub fn page(title: &str, sections: &[Section]) -> String {
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

/// A table; every cell is HTML. `left` columns from the left hold names, the others figures.
pub fn table(head: &[String], rows: &[Vec<String>], left: usize) -> String {
    let cells = |tag: &str, cells: &[String]| -> String {
        let class = |column: usize| if column < left { "" } else { " class=\"figure\"" };
        cells.iter().enumerate().map(|(column, cell)| format!("<{tag}{}>{cell}</{tag}>", class(column))).collect()
    };
    let rows: String = rows.iter().map(|row| format!("<tr>{}</tr>\n", cells("td", row))).collect();
    let head = if head.is_empty() { String::new() } else { format!("<thead><tr>{}</tr></thead>\n", cells("th", head)) };
    format!("<div class=\"wide\"><table>\n{head}<tbody>\n{rows}</tbody></table></div>\n")
}

/// An SVG with its name for those who hear the page, and a caption.
pub fn figure(svg: &str, name: &str, caption: &str) -> String {
    let (name, caption) = (escape(name), escape(caption));
    let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{name}\" "), 1);
    format!("<figure>{svg}<figcaption>{caption}</figcaption></figure>\n")
}

/// A PNG file, embedded.
pub fn picture(name: &str, png: &[u8]) -> String {
    let (name, data) = (escape(name), STANDARD.encode(png));
    format!(
        "<figure><img alt=\"{name}\" src=\"data:image/png;base64,{data}\"><figcaption>{name}</figcaption></figure>\n"
    )
}

/// A square in the colour of curve `number`.
pub fn swatch(number: usize) -> String {
    let colour = PALETTE[number % PALETTE.len()];
    format!("<span class=\"swatch\" style=\"background:#{:02x}{:02x}{:02x}\"></span>", colour.0, colour.1, colour.2)
}

/// Which curve is whose.
pub fn legend(names: &[&str]) -> String {
    let entry = |(number, name): (usize, &&str)| format!("<li>{}{}</li>", swatch(number), escape(name));
    format!("<ul class=\"legend\">{}</ul>\n", names.iter().enumerate().map(entry).collect::<String>())
}

/// A share of 0 to 1 as a bar with its figure; what is known to lie elsewhere is shown without a bar.
pub fn bar(share: f64, colour: usize) -> String {
    if !(0.0..=1.0).contains(&share) {
        return "not known".into();
    }
    let colour = PALETTE[colour % PALETTE.len()];
    let paint = format!("background:#{:02x}{:02x}{:02x}", colour.0, colour.1, colour.2);
    let percent = share * 100.0;
    format!("<span class=\"bar\"><span style=\"width:{percent:.1}%;{paint}\"></span></span> {percent:.1} %")
}
