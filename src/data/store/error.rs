//! Classifies a store's errors and describes them without secrets.

use object_store::Error;

/// The class of an error, which decides the reaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StoreErrorKind {
    /// The object does not exist.
    NotFound,
    /// The credentials were refused.
    Denied,
    /// The call would fail again.
    Permanent,
    /// The store or the network may recover.
    Transient,
}

/// Words in a response of status 400 by which S3 refuses a token: malformed, expired or signed for another region.
const DENIAL_CODES: [&str; 5] =
    ["ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AuthorizationHeaderMalformed", "TokenRefreshRequired"];

/// Text in front of a status in object_store's messages; its own type for that is private.
const STATUS_PREFIX: &str = "status code: ";

/// The environment variables whose values are secrets.
const SECRET_VARIABLES: [&str; 9] = [
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

/// Characters that separate words in messages.
const SEPARATORS: [char; 8] = [' ', '"', '\'', '(', ')', '<', '>', '\n'];

/// Classifies an error of a store that is accessed over a network.
pub(super) fn classify(error: &Error) -> StoreErrorKind {
    match error {
        Error::NotFound { .. } => StoreErrorKind::NotFound,
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreErrorKind::Denied,
        Error::Generic { .. } => classify_response(&full_text(error)),
        Error::JoinError { .. } => StoreErrorKind::Transient,
        _ => StoreErrorKind::Permanent,
    }
}

fn classify_response(text: &str) -> StoreErrorKind {
    match parse_status(text) {
        Some(400) if DENIAL_CODES.iter().any(|code| text.contains(code)) => StoreErrorKind::Denied,
        Some(401 | 403) => StoreErrorKind::Denied,
        Some(501) => StoreErrorKind::Permanent,
        Some(408 | 429 | 500..=599) | None => StoreErrorKind::Transient,
        // Status 200 with an error in the body: S3 under load.
        Some(200..=299) => StoreErrorKind::Transient,
        Some(_) => StoreErrorKind::Permanent,
    }
}

/// Describes an error in one line: the server's status, code and message where it returned any.
pub(super) fn summarize(error: &Error) -> String {
    let text = full_text(error);
    let Some(status) = parse_status(&text) else {
        return redact(&innermost_cause(error));
    };
    let details = [xml_element(&text, "Code"), xml_element(&text, "Message")];
    let details = details.into_iter().flatten().collect::<Vec<_>>().join(": ");
    redact(format!("status {status} {details}").trim())
}

fn parse_status(text: &str) -> Option<u16> {
    text.split_once(STATUS_PREFIX)?.1.get(..3)?.parse().ok()
}

/// Returns the messages of an error and its causes, outermost first.
fn chain(error: &Error) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut current: &dyn std::error::Error = error;
    while let Some(cause) = current.source() {
        messages.push(cause.to_string());
        current = cause;
    }
    messages
}

fn full_text(error: &Error) -> String {
    chain(error).join(": ")
}

/// Returns the last two causes.
fn innermost_cause(error: &Error) -> String {
    let mut causes = chain(error);
    let last = causes.pop().unwrap_or_default();
    match causes.iter().rev().find(|cause| !cause.contains(&last)) {
        Some(cause) if cause.len() < 120 => format!("{cause}: {last}"),
        _ => last,
    }
}

/// Returns the text of an XML element.
fn xml_element<'a>(body: &'a str, name: &str) -> Option<&'a str> {
    let after = body.split_once(&format!("<{name}>"))?.1;
    after.split_once(&format!("</{name}>")).map(|(text, _)| text)
}

/// Removes the queries of URLs, which contain signatures, and the values of secrets from a text.
pub(super) fn redact(text: &str) -> String {
    let mut redacted = String::new();
    for word in text.split_inclusive(SEPARATORS) {
        if word.contains("://") {
            let url = word.trim_end_matches(SEPARATORS);
            redacted.push_str(&without_query(url));
            redacted.push_str(&word[url.len()..]);
        } else {
            redacted.push_str(word);
        }
    }
    let secrets = SECRET_VARIABLES.iter().filter_map(|name| std::env::var(name).ok());
    for secret in secrets.filter(|secret| secret.len() > 3) {
        redacted = redacted.replace(&secret, "***");
    }
    redacted
}

/// Returns a URL for messages: without its query, user name and password.
pub(super) fn without_query(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            format!("{scheme}://{}{path}", host.rsplit('@').next().unwrap_or_default())
        }
        None => url.to_owned(),
    }
}
