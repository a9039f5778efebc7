//! The stores behind s3://, gs://, az:// and http(s)://: each with its cloud's usual chain of credentials, and clients
//! that suit long streams of ranged reads.

use super::profile;
use super::words::{self, scrub};
use crate::fault::{Code, Fault, Result};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// How long the search for credentials may take: on a machine of no cloud, the last place asked never answers.
const CREDENTIALS: Duration = Duration::from_secs(4);

/// A store in a cloud, opened.
pub(super) struct Opened {
    /// Gives up after a few seconds; `patience` asks again, with fresh credentials and a word to the user.
    pub quick: Arc<dyn ObjectStore>,
    /// Asks again by itself for minutes: for uploads in parts, where a part cannot be told apart from its repetition.
    pub bulk: Arc<dyn ObjectStore>,
    pub root: Key,
    /// Scheme and authority, with a slash.
    pub origin: String,
}

/// Opens `text` if its scheme is one of a cloud's. Faults: Code::Usage on a URL or setting that cannot be, and
/// Code::Credentials where there are none.
pub(super) fn open(text: &str) -> Result<Opened> {
    let name = words::without_query(text);
    let url = Url::parse(text).map_err(|error| Fault::usage(format!("{name}: not a URL: {error}")))?;
    let (scheme, path) = ObjectStoreScheme::parse(&url)
        .map_err(|_| Fault::usage(format!("{name}: no store has that scheme; there are {}", super::SCHEMES)))?;
    let root = Key::from_url_path(path.as_ref()).map_err(|error| Fault::usage(format!("{name}: {error}")))?;
    let build = |retry: RetryConfig| -> Result<Arc<dyn ObjectStore>> {
        match scheme {
            ObjectStoreScheme::AmazonS3 => s3(&url, retry),
            ObjectStoreScheme::GoogleCloudStorage => gcs(&url, retry),
            ObjectStoreScheme::MicrosoftAzure => azure(&url, retry),
            ObjectStoreScheme::Http => http(&url, retry),
            _ => Err(Fault::usage(format!("there are {}", super::SCHEMES))),
        }
        .map_err(|fault| fault.at(&name))
    };
    let (quick, bulk) = (build(retries(2, 20))?, build(retries(1000, 280))?);
    // What is left of the URL once the path inside the store is taken off.
    let whole = words::without_query(url.as_str());
    let origin = whole.trim_end_matches('/').strip_suffix(url_path(&url, &root)).unwrap_or(&whole);
    Ok(Opened { quick, bulk, root, origin: format!("{}/", origin.trim_end_matches('/')) })
}

/// The path inside the store as the URL spells it.
fn url_path<'a>(url: &'a Url, root: &Key) -> &'a str {
    let path = url.path().trim_end_matches('/');
    let segments = root.parts().count();
    match segments {
        0 => "",
        n => path.rmatch_indices('/').nth(n - 1).map_or(path, |(at, _)| &path[at..]),
    }
}

fn retries(most: usize, seconds: u64) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries: most,
        retry_timeout: Duration::from_secs(seconds),
    }
}

/// One connection a request, so that many in flight add up (a single HTTP/2 connection caps them all); a read that
/// stalls is noticed, one that is slow goes on.
fn settings() -> [(ClientConfigKey, &'static str); 5] {
    [
        (ClientConfigKey::Http1Only, "true"),
        (ClientConfigKey::ConnectTimeout, "5 seconds"),
        (ClientConfigKey::ReadTimeout, "15 seconds"),
        (ClientConfigKey::Timeout, "1 day"),
        (ClientConfigKey::PoolMaxIdlePerHost, "256"),
    ]
}

fn s3(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let mut builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry);
    let told = ["AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"];
    let told = told.into_iter().chain(["AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE"]).any(set);
    let profile = profile::read()?;
    if let (false, Some(keys)) = (told, &profile.keys) {
        builder = builder.with_access_key_id(&keys.id).with_secret_access_key(&keys.secret);
        builder = keys.token.iter().fold(builder, |builder, token| builder.with_token(token));
    }
    if let (false, Some(region)) = (set("AWS_REGION") || set("AWS_DEFAULT_REGION"), &profile.region) {
        builder = builder.with_region(region);
    }
    if let (false, Some(endpoint)) = (set("AWS_ENDPOINT_URL") || set("AWS_ENDPOINT"), &profile.endpoint) {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(endpoint) = builder.get_config_value(&AmazonS3ConfigKey::Endpoint)
        && loopback(&endpoint)
    {
        builder = builder.with_allow_http(true);
    }
    for (key, value) in settings() {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    let unsigned = std::env::var("AWS_SKIP_SIGNATURE").is_ok_and(|v| v != "false" && v != "0");
    let store = builder.build().map_err(wrong)?;
    if !unsigned {
        let found = store.credentials().clone();
        credentials(async move { found.get_credential().await.map(drop) }, AWS_REMEDY)?;
    }
    Ok(Arc::new(store))
}

const AWS_REMEDY: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with a file \
                          ~/.aws/credentials, or give the machine a role; for a public bucket set AWS_SKIP_SIGNATURE=true";

fn gcs(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retry);
    for (key, value) in settings() {
        builder = builder.with_config(object_store::gcp::GoogleConfigKey::Client(key), value);
    }
    let plain = std::env::var("GOOGLE_SERVICE_ACCOUNT")
        .or_else(|_| std::env::var("GOOGLE_APPLICATION_CREDENTIALS"))
        .ok()
        .and_then(|file| std::fs::read_to_string(file).ok())
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
        .and_then(|json| json["gcs_base_url"].as_str().map(loopback));
    if plain == Some(true) {
        builder = builder.with_config(object_store::gcp::GoogleConfigKey::Client(ClientConfigKey::AllowHttp), "true");
    }
    let store = builder.build().map_err(wrong)?;
    let found = store.credentials().clone();
    let remedy = "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file, run `gcloud auth \
                  application-default login`, or give the machine a service account; for a public bucket set \
                  GOOGLE_SKIP_SIGNATURE=true";
    if !std::env::var("GOOGLE_SKIP_SIGNATURE").is_ok_and(|v| v != "false" && v != "0") {
        credentials(async move { found.get_credential().await.map(drop) }, remedy)?;
    }
    Ok(Arc::new(store))
}

fn azure(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str()).with_retry(retry);
    if std::env::var("AZURE_STORAGE_USE_EMULATOR").is_ok_and(|v| v == "true" || v == "1")
        || std::env::var("AZURE_STORAGE_ENDPOINT").is_ok_and(|endpoint| loopback(&endpoint))
    {
        builder = builder.with_allow_http(true);
    }
    for (key, value) in settings() {
        builder = builder.with_config(object_store::azure::AzureConfigKey::Client(key), value);
    }
    let store = builder.build().map_err(wrong)?;
    let found = store.credentials().clone();
    let remedy = "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, \
                  AZURE_USE_AZURE_CLI=true after `az login`, or give the machine an identity";
    if !std::env::var("AZURE_SKIP_SIGNATURE").is_ok_and(|v| v != "false" && v != "0") {
        credentials(async move { found.get_credential().await.map(drop) }, remedy)?;
    }
    Ok(Arc::new(store))
}

fn http(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let root = format!("{}://{}", url.scheme(), url.authority());
    let options =
        settings().into_iter().fold(ClientOptions::new(), |options, (key, value)| options.with_config(key, value));
    // Somebody who writes http:// has seen that it is not https://.
    let options = options.with_allow_http(url.scheme() == "http");
    let store = HttpBuilder::new().with_url(root).with_client_options(options).with_retry(retry).build();
    Ok(Arc::new(store.map_err(wrong)?))
}

/// Whether an endpoint is this machine, where nobody listens in on plain HTTP.
fn loopback(endpoint: &str) -> bool {
    let host = Url::parse(endpoint).ok().and_then(|url| url.host_str().map(str::to_owned));
    matches!(host.as_deref(), Some("localhost" | "127.0.0.1" | "[::1]"))
}

/// Asks for the credentials now, where the user still looks.
fn credentials(found: impl Future<Output = object_store::Result<()>>, remedy: &str) -> Result<()> {
    let answer = super::RUNTIME.block_on(async { tokio::time::timeout(CREDENTIALS, found).await });
    let why = match answer {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => words::shortly(&error),
        Err(_) => format!("nothing answered within {} s", CREDENTIALS.as_secs()),
    };
    Err(Fault::new(Code::Credentials, format!("no credentials were found ({}): {remedy}", scrub(&why))))
}

fn wrong(error: object_store::Error) -> Fault {
    Fault::usage(format!("the store's settings do not fit together: {}", words::shortly(&error)))
}
