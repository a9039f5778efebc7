//! The stores behind s3://, gs://, az:// and http(s)://: the usual credential chain of each cloud, and clients
//! configured for long streams of ranged reads.

use super::aws_profile;
use super::error::{redact, summarize, without_query};
use crate::error::{Error, ExitCode, Result};
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::path::Path as Key;
use object_store::{BackoffConfig, ClientConfigKey, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use std::sync::Arc;
use std::time::Duration;
use url::Url;

/// Maximum time of the search for credentials: outside a cloud, the last place in the chain never responds.
const CREDENTIALS_TIMEOUT: Duration = Duration::from_secs(4);

/// The clients of a cloud store.
pub(super) struct CloudStore {
    /// Fails after a few seconds; `RetryBudget` repeats the call, with fresh credentials and a message to the user.
    pub client: Arc<dyn ObjectStore>,
    /// Retries for minutes by itself: for multipart uploads, where a part and its repetition look the same.
    pub upload_client: Arc<dyn ObjectStore>,
    pub root: Key,
    /// Scheme and authority, with a slash.
    pub origin: String,
}

/// Opens a URL of a cloud or a web server.
///
/// # Errors
/// ExitCode::Usage for an invalid URL or setting, ExitCode::Credentials where there are none.
pub(super) fn open(text: &str) -> Result<CloudStore> {
    let name = without_query(text);
    let url = Url::parse(text).map_err(|error| Error::usage(format!("{name}: not a URL: {error}")))?;
    let (scheme, path) = ObjectStoreScheme::parse(&url)
        .map_err(|_| Error::usage(format!("{name}: no store has that scheme; there are {}", super::SCHEMES)))?;
    let root = Key::from_url_path(path.as_ref()).map_err(|error| Error::usage(format!("{name}: {error}")))?;
    let build = |retry: RetryConfig| -> Result<Arc<dyn ObjectStore>> {
        let client = match scheme {
            ObjectStoreScheme::AmazonS3 => build_s3(&url, retry),
            ObjectStoreScheme::GoogleCloudStorage => build_gcs(&url, retry),
            ObjectStoreScheme::MicrosoftAzure => build_azure(&url, retry),
            ObjectStoreScheme::Http => build_http(&url, retry),
            _ => Err(Error::usage(format!("there are {}", super::SCHEMES))),
        };
        client.map_err(|error| error.with_context(&name))
    };
    let client = build(retry_config(2, 20))?;
    let upload_client = build(retry_config(1000, 280))?;
    // The origin is the URL without the path inside the store.
    let full = without_query(url.as_str());
    let origin = full.trim_end_matches('/').strip_suffix(url_path(&url, &root)).unwrap_or(&full);
    let origin = format!("{}/", origin.trim_end_matches('/'));
    Ok(CloudStore { client, upload_client, root, origin })
}

/// Returns the path inside the store as it is written in the URL.
fn url_path<'a>(url: &'a Url, root: &Key) -> &'a str {
    let path = url.path().trim_end_matches('/');
    match root.parts().count() {
        0 => "",
        segments => path.rmatch_indices('/').nth(segments - 1).map_or(path, |(start, _)| &path[start..]),
    }
}

fn retry_config(max_retries: usize, timeout_s: u64) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries,
        retry_timeout: Duration::from_secs(timeout_s),
    }
}

/// Returns the settings of every client: one connection per request, so that concurrent requests are not limited by a
/// single HTTP/2 connection; a stalled read times out, a slow one continues.
fn client_settings() -> [(ClientConfigKey, &'static str); 5] {
    [
        (ClientConfigKey::Http1Only, "true"),
        (ClientConfigKey::ConnectTimeout, "5 seconds"),
        (ClientConfigKey::ReadTimeout, "15 seconds"),
        (ClientConfigKey::Timeout, "1 day"),
        (ClientConfigKey::PoolMaxIdlePerHost, "256"),
    ]
}

fn build_s3(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = AmazonS3Builder::from_env().with_url(url.as_str()).with_retry(retry);
    let profile = aws_profile::read()?;
    let has_credentials = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",
    ]
    .into_iter()
    .any(is_set);
    if let (false, Some(key)) = (has_credentials, &profile.access_key) {
        builder = builder.with_access_key_id(&key.id).with_secret_access_key(&key.secret);
        if let Some(token) = &key.token {
            builder = builder.with_token(token);
        }
    }
    let has_region = is_set("AWS_REGION") || is_set("AWS_DEFAULT_REGION");
    if let (false, Some(region)) = (has_region, &profile.region) {
        builder = builder.with_region(region);
    }
    let has_endpoint = is_set("AWS_ENDPOINT_URL") || is_set("AWS_ENDPOINT");
    if let (false, Some(endpoint)) = (has_endpoint, &profile.endpoint) {
        builder = builder.with_endpoint(endpoint);
    }
    if let Some(endpoint) = builder.get_config_value(&AmazonS3ConfigKey::Endpoint)
        && is_loopback(&endpoint)
    {
        builder = builder.with_allow_http(true);
    }
    for (key, value) in client_settings() {
        builder = builder.with_config(AmazonS3ConfigKey::Client(key), value);
    }
    let store = builder.build().map_err(settings_error)?;
    if !is_enabled("AWS_SKIP_SIGNATURE") {
        let provider = store.credentials().clone();
        check_credentials(async move { provider.get_credential().await.map(drop) }, AWS_REMEDY)?;
    }
    Ok(Arc::new(store))
}

const AWS_REMEDY: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE with a file \
                          ~/.aws/credentials, or give the machine a role; for a public bucket set \
                          AWS_SKIP_SIGNATURE=true";

fn build_gcs(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = GoogleCloudStorageBuilder::from_env().with_url(url.as_str()).with_retry(retry);
    for (key, value) in client_settings() {
        builder = builder.with_config(object_store::gcp::GoogleConfigKey::Client(key), value);
    }
    // An emulator on this machine is named in the service account's file.
    let is_emulator = std::env::var("GOOGLE_SERVICE_ACCOUNT")
        .or_else(|_| std::env::var("GOOGLE_APPLICATION_CREDENTIALS"))
        .ok()
        .and_then(|file| std::fs::read_to_string(file).ok())
        .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok())
        .and_then(|json| json["gcs_base_url"].as_str().map(is_loopback));
    if is_emulator == Some(true) {
        builder = builder.with_config(object_store::gcp::GoogleConfigKey::Client(ClientConfigKey::AllowHttp), "true");
    }
    let store = builder.build().map_err(settings_error)?;
    if !is_enabled("GOOGLE_SKIP_SIGNATURE") {
        let provider = store.credentials().clone();
        let remedy = "set GOOGLE_APPLICATION_CREDENTIALS to a service account's file, run `gcloud auth \
                      application-default login`, or give the machine a service account; for a public bucket set \
                      GOOGLE_SKIP_SIGNATURE=true";
        check_credentials(async move { provider.get_credential().await.map(drop) }, remedy)?;
    }
    Ok(Arc::new(store))
}

fn build_azure(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let mut builder = MicrosoftAzureBuilder::from_env().with_url(url.as_str()).with_retry(retry);
    if std::env::var("AZURE_STORAGE_USE_EMULATOR").is_ok_and(|value| value == "true" || value == "1")
        || std::env::var("AZURE_STORAGE_ENDPOINT").is_ok_and(|endpoint| is_loopback(&endpoint))
    {
        builder = builder.with_allow_http(true);
    }
    for (key, value) in client_settings() {
        builder = builder.with_config(object_store::azure::AzureConfigKey::Client(key), value);
    }
    let store = builder.build().map_err(settings_error)?;
    if !is_enabled("AZURE_SKIP_SIGNATURE") {
        let provider = store.credentials().clone();
        let remedy = "set AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, \
                      AZURE_USE_AZURE_CLI=true after `az login`, or give the machine an identity";
        check_credentials(async move { provider.get_credential().await.map(drop) }, remedy)?;
    }
    Ok(Arc::new(store))
}

fn build_http(url: &Url, retry: RetryConfig) -> Result<Arc<dyn ObjectStore>> {
    let root = format!("{}://{}", url.scheme(), url.authority());
    let mut options = ClientOptions::new();
    for (key, value) in client_settings() {
        options = options.with_config(key, value);
    }
    // Plain HTTP is allowed where the URL asks for it.
    let options = options.with_allow_http(url.scheme() == "http");
    let store = HttpBuilder::new().with_url(root).with_client_options(options).with_retry(retry).build();
    Ok(Arc::new(store.map_err(settings_error)?))
}

/// Returns whether an environment variable is set and not empty.
fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

/// Returns whether an environment variable is set to something other than "false" and "0".
fn is_enabled(name: &str) -> bool {
    std::env::var(name).is_ok_and(|value| value != "false" && value != "0")
}

/// Returns whether an endpoint is this machine, where plain HTTP is safe.
fn is_loopback(endpoint: &str) -> bool {
    let host = Url::parse(endpoint).ok().and_then(|url| url.host_str().map(str::to_owned));
    matches!(host.as_deref(), Some("localhost" | "127.0.0.1" | "[::1]"))
}

/// Looks up the credentials, so that missing ones are reported at the start of the program.
fn check_credentials(lookup: impl Future<Output = object_store::Result<()>>, remedy: &str) -> Result<()> {
    let result = super::RUNTIME.block_on(async { tokio::time::timeout(CREDENTIALS_TIMEOUT, lookup).await });
    let why = match result {
        Ok(Ok(())) => return Ok(()),
        Ok(Err(error)) => summarize(&error),
        Err(_) => format!("no answer within {} s", CREDENTIALS_TIMEOUT.as_secs()),
    };
    Err(Error::new(ExitCode::Credentials, format!("no credentials were found ({}): {remedy}", redact(&why))))
}

fn settings_error(error: object_store::Error) -> Error {
    Error::usage(format!("the store's settings are invalid: {}", summarize(&error)))
}
