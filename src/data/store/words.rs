//! What a store's errors mean, said in our words and without a secret.

use object_store::Error;

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It is not there.
    Absent,
    /// The credentials were refused.
    Refused,
    /// Nothing changes by asking again.
    Lasting,
    /// The store, or the way to it, has trouble that may pass.
    Passing,
}

/// Sorts an error of a store that is reached over a network.
pub(super) fn kind(error: &Error) -> Kind {
    match error {
        Error::NotFound { .. } => Kind::Absent,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => Kind::Refused,
        Error::Generic { .. } => match status(&whole(error)) {
            // S3 says 400 for a token that is malformed, expired or signed for another region.
            Some(400) if REFUSALS.iter().any(|word| whole(error).contains(word)) => Kind::Refused,
            Some(401 | 403) => Kind::Refused,
            Some(501) => Kind::Lasting,
            Some(408 | 429 | 500..=599) | None => Kind::Passing,
            // 200 with an error in its body: S3 under load.
            Some(200..=299) => Kind::Passing,
            Some(_) => Kind::Lasting,
        },
        Error::JoinError { .. } => Kind::Passing,
        _ => Kind::Lasting,
    }
}

const REFUSALS: [&str; 5] =
    ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AuthorizationHeaderMalformed", "TokenRefreshRequired"];

/// The error in one line: the server's status, code and message where it gave any.
pub(super) fn shortly(error: &Error) -> String {
    let text = whole(error);
    let said = [tag(&text, "Code"), tag(&text, "Message")].into_iter().flatten().collect::<Vec<_>>().join(": ");
    match status(&text) {
        Some(status) => scrub(format!("status {status} {said}").trim()),
        None => scrub(&innermost(error)),
    }
}

/// What object_store says about a status; its own type for that is private.
const STATUS: &str = "status code: ";

fn status(text: &str) -> Option<u16> {
    text.split_once(STATUS)?.1.get(..3)?.parse().ok()
}

/// The error and its causes.
fn whole(error: &Error) -> String {
    let mut text = error.to_string();
    let mut here: &dyn std::error::Error = error;
    while let Some(next) = here.source() {
        text = format!("{text}: {next}");
        here = next;
    }
    text
}

/// The last two causes: what went wrong, and why.
fn innermost(error: &Error) -> String {
    let mut causes = vec![error.to_string()];
    let mut here: &dyn std::error::Error = error;
    while let Some(next) = here.source() {
        causes.push(next.to_string());
        here = next;
    }
    let last = causes.pop().unwrap_or_default();
    match causes.iter().rev().find(|cause| !cause.contains(&last)) {
        Some(cause) if cause.len() < 120 => format!("{cause}: {last}"),
        _ => last,
    }
}

/// The text of an XML element.
fn tag<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    let after = body.split_once(&format!("<{name}>"))?.1;
    after.split_once(&format!("</{name}>")).map(|(text, _)| text)
}

/// The variables whose values are secrets.
const SECRETS: [&str; 9] = [
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_ACCESS_KEY",
    "AZURE_STORAGE_SAS_TOKEN",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_CLIENT_SECRET",
    "AZURE_STORAGE_TOKEN",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
];

/// The text without the queries of URLs (signatures are passed there) and without the value of any secret.
pub(super) fn scrub(text: &str) -> String {
    let mut out = String::new();
    for word in text.split_inclusive([' ', '"', '\'', '(', ')', '<', '>', '\n']) {
        if word.contains("://") {
            let bare = word.trim_end_matches([' ', '"', '\'', '(', ')', '<', '>', '\n']);
            out.push_str(&without_query(bare));
            out.push_str(&word[bare.len()..]);
        } else {
            out.push_str(word);
        }
    }
    for secret in SECRETS.iter().filter_map(|name| std::env::var(name).ok()).filter(|secret| secret.len() > 3) {
        out = out.replace(&secret, "***");
    }
    out
}

/// A URL fit for a message: without its query and without a user's name and password.
pub(super) fn without_query(url: &str) -> String {
    let bare = url.split(['?', '#']).next().unwrap_or_default();
    match bare.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        None => bare.to_owned(),
    }
}
