//! An object store in memory that serves the requests that object_store makes to S3, to Google's store and to a web
//! server, and that fails on request: slow, silent, unavailable, corrupt.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, IF_MATCH, IF_NONE_MATCH, LAST_MODIFIED, RANGE};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpListener;

/// Faults to inject. None by default.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Delay before every response.
    pub latency: Duration,
    /// Every n-th response is 503; none at 0.
    pub fail_every: u64,
    /// Every response is 503 until then.
    pub away_until: Option<Instant>,
    /// Number of further requests that are never answered.
    pub silent: u32,
    /// Number of further bodies that stop half way and stay open.
    pub stalls: u32,
    /// Number of further bodies that have one bit flipped.
    pub flips: u32,
    /// Number of further bodies that are half as long as they should be, with a matching length header.
    pub halves: u32,
    /// Number of further objects that are written although the response is 500.
    pub lost_answers: u32,
    /// Bytes per second of each body.
    pub rate: Option<u64>,
}

#[derive(Default)]
struct State {
    /// Objects by `bucket/key`.
    objects: BTreeMap<String, Bytes>,
    uploads: BTreeMap<String, BTreeMap<u32, Bytes>>,
    faults: Faults,
    requests: u64,
    connections: u64,
    /// Responses in flight, and their maximum.
    under_way: (u64, u64),
    /// Requests must name this access key.
    access_key: Option<String>,
}

/// A running server; it ends with the process.
#[derive(Clone)]
pub struct Server {
    pub port: u16,
    state: Arc<Mutex<State>>,
}

type Body = StreamBody<BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

impl Server {
    pub fn start() -> Server {
        let state = Arc::new(Mutex::new(State::default()));
        let (output, port) = std::sync::mpsc::channel();
        let shared = state.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
                output.send(listener.local_addr().expect("an address").port()).expect("the starter waits");
                loop {
                    let (stream, _) = listener.accept().await.expect("a connection");
                    let state = shared.clone();
                    state.lock().expect("no panic").connections += 1;
                    let _ = stream.set_nodelay(true);
                    tokio::spawn(async move {
                        let service = service_fn(move |request| answer(state.clone(), request));
                        let http = hyper::server::conn::http1::Builder::new();
                        let _ = http.serve_connection(TokioIo::new(stream), service).await;
                    });
                }
            });
        });
        Server { port: port.recv().expect("a server"), state }
    }

    /// Returns the URL of `bucket` as a web server.
    pub fn http(&self, bucket: &str) -> String {
        format!("http://127.0.0.1:{}/{bucket}", self.port)
    }

    /// Returns the environment of an S3 client.
    pub fn s3_environment(&self, access_key: &str) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_ACCESS_KEY_ID", access_key.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "canary-secret".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
        ]
    }

    /// Uploads every file of a folder to `bucket`.
    pub fn upload(&self, folder: &Path, bucket: &str) -> std::io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if path.is_file() {
                let name = path.file_name().expect("a name").to_string_lossy().into_owned();
                self.put(&format!("{bucket}/{name}"), std::fs::read(&path)?);
            }
        }
        Ok(())
    }

    pub fn put(&self, key: &str, bytes: Vec<u8>) {
        self.state.lock().expect("no panic").objects.insert(key.to_owned(), bytes.into());
    }

    /// Writes the objects below a prefix as files of a folder.
    pub fn download(&self, prefix: &str, folder: &Path) -> std::io::Result<()> {
        for (key, bytes) in &self.state.lock().expect("no panic").objects {
            if let Some(name) = key.strip_prefix(&format!("{prefix}/")) {
                let path = folder.join(name);
                std::fs::create_dir_all(path.parent().expect("a folder"))?;
                std::fs::write(path, bytes)?;
            }
        }
        Ok(())
    }

    pub fn keys(&self) -> Vec<String> {
        self.state.lock().expect("no panic").objects.keys().cloned().collect()
    }

    pub fn faults(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.state.lock().expect("no panic").faults);
    }

    /// Accepts only this access key from now on.
    pub fn admit(&self, access_key: &str) {
        self.state.lock().expect("no panic").access_key = Some(access_key.to_owned());
    }

    pub fn requests(&self) -> u64 {
        self.state.lock().expect("no panic").requests
    }

    pub fn connections(&self) -> u64 {
        self.state.lock().expect("no panic").connections
    }

    pub fn most_under_way(&self) -> u64 {
        self.state.lock().expect("no panic").under_way.1
    }
}

/// Serves the files of a folder as `b/shards/…` until the process is killed, and prints the port. Each response takes
/// OCCLUDE_LATENCY_MS, and every OCCLUDE_FAIL_EVERY-th is a failure, where those are set.
pub fn case() -> i32 {
    let server = Server::start();
    let number = |name: &str| std::env::var(name).map_or(0, |text| text.parse().expect("a number"));
    server.faults(|faults| {
        faults.latency = Duration::from_millis(number("OCCLUDE_LATENCY_MS"));
        faults.fail_every = number("OCCLUDE_FAIL_EVERY");
    });
    let folder = std::env::var_os("OCCLUDE_FOLDER").expect("a folder");
    server.upload(Path::new(&folder), "b/shards").expect("files");
    println!("{}", server.port);
    loop {
        std::thread::park();
    }
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (faults, number) = {
        let mut state = state.lock().expect("no panic");
        state.requests += 1;
        state.under_way.0 += 1;
        state.under_way.1 = state.under_way.1.max(state.under_way.0);
        let silent = state.faults.silent > 0;
        state.faults.silent -= u32::from(silent);
        (Faults { silent: u32::from(silent), ..state.faults.clone() }, state.requests)
    };
    if faults.silent > 0 {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    tokio::time::sleep(faults.latency).await;
    let away = faults.away_until.is_some_and(|until| Instant::now() < until);
    let response = if away || (faults.fail_every > 0 && number % faults.fail_every == 0) {
        failure(StatusCode::SERVICE_UNAVAILABLE, "SlowDown")
    } else {
        serve(&state, request).await
    };
    state.lock().expect("no panic").under_way.0 -= 1;
    Ok(response)
}

async fn serve(state: &Mutex<State>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let path = percent(parts.uri.path().trim_start_matches('/'));
    let query: BTreeMap<String, String> = parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (percent(name), percent(value)))
        .collect();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let mut state = state.lock().expect("no panic");
    if let Some(key) = &state.access_key
        && !header(AUTHORIZATION.as_str()).is_some_and(|text| text.contains(&format!("Credential={key}/")))
    {
        return failure(StatusCode::FORBIDDEN, "InvalidAccessKeyId");
    }
    match parts.method {
        Method::GET if query.contains_key("list-type") => list(&state, &path, &query),
        Method::GET | Method::HEAD => match state.objects.get(&path).cloned() {
            None => failure(StatusCode::NOT_FOUND, "NoSuchKey"),
            Some(bytes) if header(IF_MATCH.as_str()).is_some_and(|tag| tag != etag(&bytes)) => {
                let _ = bytes;
                failure(StatusCode::PRECONDITION_FAILED, "PreconditionFailed")
            }
            Some(bytes) => object(&mut state, bytes, header(RANGE.as_str()), parts.method == Method::HEAD),
        },
        Method::PUT if query.contains_key("partNumber") => {
            let number = query["partNumber"].parse().unwrap_or(0);
            let tag = etag(&body);
            state.uploads.entry(query["uploadId"].clone()).or_default().insert(number, body);
            done(StatusCode::OK, &[(ETAG.as_str(), &tag)], "")
        }
        Method::PUT => {
            let conditional = header(IF_NONE_MATCH.as_str()).is_some()
                || header("x-goog-if-generation-match").is_some_and(|generation| generation == "0");
            put(&mut state, path, body, conditional)
        }
        Method::POST => post(&mut state, path, &query, &body),
        Method::DELETE => {
            state.objects.remove(&path);
            done(StatusCode::NO_CONTENT, &[], "")
        }
        _ => failure(StatusCode::NOT_IMPLEMENTED, "NotImplemented"),
    }
}

/// Stores an object; a conditional request must not replace one.
fn put(state: &mut State, path: String, body: Bytes, conditional: bool) -> Response<Body> {
    if conditional && state.objects.contains_key(&path) {
        return failure(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
    }
    let tag = etag(&body);
    state.objects.insert(path, body);
    if state.faults.lost_answers > 0 {
        state.faults.lost_answers -= 1;
        return failure(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
    }
    done(StatusCode::OK, &[(ETAG.as_str(), &tag), ("x-goog-generation", "1")], "")
}

/// Begins or completes a multipart upload, or deletes several objects.
fn post(state: &mut State, path: String, query: &BTreeMap<String, String>, body: &[u8]) -> Response<Body> {
    if query.contains_key("uploads") {
        let id = format!("upload-{}", state.uploads.len());
        state.uploads.insert(id.clone(), BTreeMap::new());
        let xml = format!(
            "<InitiateMultipartUploadResult><Bucket>b</Bucket><Key>k</Key><UploadId>{id}</UploadId>\
             </InitiateMultipartUploadResult>"
        );
        done(StatusCode::OK, &[], &xml)
    } else if let Some(id) = query.get("uploadId") {
        let parts = state.uploads.remove(id).unwrap_or_default();
        let full: Vec<u8> = parts.into_values().flatten().collect();
        let tag = etag(&full).replace('"', "&quot;");
        state.objects.insert(path, full.into());
        let xml = format!("<CompleteMultipartUploadResult><ETag>{tag}</ETag></CompleteMultipartUploadResult>");
        done(StatusCode::OK, &[("x-goog-generation", "1")], &xml)
    } else if query.contains_key("delete") {
        let text = String::from_utf8_lossy(body).into_owned();
        let mut xml = String::new();
        for key in text.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next()) {
            state.objects.remove(&format!("{}/{key}", path.trim_end_matches('/')));
            xml.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
        }
        done(StatusCode::OK, &[], &format!("<DeleteResult>{xml}</DeleteResult>"))
    } else {
        failure(StatusCode::NOT_IMPLEMENTED, "NotImplemented")
    }
}

/// Returns the bytes of an object, or a range of them, with the injected faults.
fn object(state: &mut State, bytes: Bytes, range: Option<String>, head: bool) -> Response<Body> {
    let bounds = range.as_deref().and_then(|text| text.strip_prefix("bytes=")?.split_once('-'));
    let bounds = bounds.map(|(first, last)| {
        let first: usize = first.parse().unwrap_or(0);
        first..last.parse::<usize>().map_or(bytes.len(), |last| (last + 1).min(bytes.len()))
    });
    if bounds.as_ref().is_some_and(|bounds| bounds.start >= bytes.len()) {
        return failure(StatusCode::RANGE_NOT_SATISFIABLE, "InvalidRange");
    }
    let mut body = bounds.as_ref().map_or(bytes.clone(), |bounds| bytes.slice(bounds.clone()));
    let faults = &mut state.faults;
    let mut take = |count: fn(&mut Faults) -> &mut u32| {
        let count = count(faults);
        let due = *count > 0 && !head;
        *count -= u32::from(due);
        due
    };
    let stall = take(|f| &mut f.stalls);
    let flip = take(|f| &mut f.flips);
    let half = take(|f| &mut f.halves);
    if half {
        body = body.slice(..body.len() / 2);
    }
    if flip {
        let mut flipped = body.to_vec();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 4;
        body = flipped.into();
    }
    let length = body.len().to_string();
    let status = if bounds.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut response = Response::builder()
        .status(status)
        .header(ETAG, etag(&bytes))
        .header(LAST_MODIFIED, "Mon, 23 Nov 2026 00:00:00 GMT")
        .header(CONTENT_LENGTH, length);
    if let Some(bounds) = &bounds {
        let end = bounds.start + body.len().max(1) - 1;
        response = response.header("content-range", format!("bytes {}-{end}/{}", bounds.start, bytes.len()));
    }
    let rate = faults.rate;
    let stream = if head { futures::stream::empty().boxed() } else { body_chunks(body, rate, stall) };
    response.body(StreamBody::new(stream)).expect("a response")
}

/// Returns a body in chunks, slowly, or stopping half way.
fn body_chunks(body: Bytes, rate: Option<u64>, stall: bool) -> BoxStream<'static, Result<Frame<Bytes>, Infallible>> {
    let piece = rate.map_or(body.len(), |rate| (rate / 10) as usize).max(1);
    let stop = if stall { body.len() / 2 } else { usize::MAX };
    futures::stream::unfold(0, move |at| {
        let body = body.clone();
        async move {
            if at >= body.len() {
                return None;
            }
            if at >= stop {
                tokio::time::sleep(Duration::from_secs(3600)).await;
            }
            if rate.is_some() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let end = (at + piece).min(body.len()).min(if at < stop { stop } else { usize::MAX });
            Some((Ok(Frame::data(body.slice(at..end))), end))
        }
    })
    .boxed()
}

fn list(state: &State, bucket: &str, query: &BTreeMap<String, String>) -> Response<Body> {
    let inside = format!("{}/", bucket.trim_end_matches('/'));
    let prefix = query.get("prefix").cloned().unwrap_or_default();
    let folders = query.contains_key("delimiter");
    let mut contents = String::new();
    let mut common = std::collections::BTreeSet::new();
    for (key, bytes) in &state.objects {
        let Some(key) = key.strip_prefix(&inside).filter(|key| key.starts_with(&prefix)) else { continue };
        match key[prefix.len()..].find('/') {
            Some(slash) if folders => {
                common.insert(key[..prefix.len() + slash + 1].to_owned());
            }
            _ => contents.push_str(&format!(
                "<Contents><Key>{key}</Key><Size>{}</Size><LastModified>2026-11-23T00:00:00.000Z</LastModified>\
                 <ETag>{}</ETag></Contents>",
                bytes.len(),
                etag(bytes).replace('"', "&quot;")
            )),
        }
    }
    let common: String =
        common.iter().map(|prefix| format!("<CommonPrefixes><Prefix>{prefix}</Prefix></CommonPrefixes>")).collect();
    let xml = format!("<ListBucketResult><IsTruncated>false</IsTruncated>{contents}{common}</ListBucketResult>");
    done(StatusCode::OK, &[], &xml)
}

fn etag(bytes: &[u8]) -> String {
    format!("\"{}\"", &blake3::hash(bytes).to_hex()[..32])
}

fn failure(status: StatusCode, code: &str) -> Response<Body> {
    done(status, &[], &format!("<Error><Code>{code}</Code><Message>as the test asked</Message></Error>"))
}

fn done(status: StatusCode, headers: &[(&str, &str)], text: &str) -> Response<Body> {
    let body = Bytes::from(text.to_owned());
    let response = Response::builder().status(status).header(CONTENT_LENGTH, body.len());
    let response = headers.iter().fold(response, |response, (name, value)| response.header(*name, *value));
    let stream = futures::stream::iter((!body.is_empty()).then(|| Ok(Frame::data(body)))).boxed();
    response.body(StreamBody::new(stream)).expect("a response")
}

/// Decodes percent-encoding.
fn percent(text: &str) -> String {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        let code = match byte {
            b'%' => {
                let digits = [bytes.next().unwrap_or(b'0'), bytes.next().unwrap_or(b'0')];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap_or("0"), 16).unwrap_or(0)
            }
            b'+' => b' ',
            byte => byte,
        };
        out.push(code);
    }
    String::from_utf8_lossy(&out).into_owned()
}
