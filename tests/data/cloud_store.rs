//! Tests of cloud stores, each through its own protocol: S3 (the test server and moto), Azure (azurite), Google (the
//! test server). Every case runs in its own process, because credentials come from the environment.

use crate::support::object_store::Server;
use crate::support::{Outcome, root};
use libtest_mimic::Failed;
use occlude::data::store::Store;
use occlude::error::ExitCode;
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

crate::trials![
    s3_fulfills_the_store_contract,
    moto_s3_fulfills_the_store_contract,
    azure_fulfills_the_store_contract,
    google_storage_fulfills_the_store_contract,
    credentials_can_come_from_a_profile,
    rejected_credentials_are_reported_at_once,
    missing_credentials_are_reported_at_once,
    secrets_are_never_printed,
    an_unknown_scheme_is_named,
];

/// Runs the store contract in its own process on the URL that it is given.
pub fn case(name: &str) -> i32 {
    let url = std::env::var("OCCLUDE_URL").expect("a URL");
    let result = match name {
        "cloud-promises" => check_contract(&url),
        _ => Store::open_with_timeout(&url, Duration::from_secs(2)).and_then(|store| store.list("")).map(drop),
    };
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("{error}");
            error.code as i32
        }
    }
}

fn check_contract(url: &str) -> occlude::error::Result<()> {
    let store = Store::open_with_timeout(url, Duration::from_secs(20))?;
    assert_eq!(store.list("")?, [], "an empty folder");
    assert_eq!(store.get_optional("absent")?, None);
    assert_eq!(store.size("absent")?, None);
    store.put("a/one", b"0123456789")?;
    store.put("a/two words", b"x")?;
    store.put("b/deep/three", b"")?;
    assert_eq!(store.get("a/one")?, b"0123456789");
    assert_eq!(store.get_range("a/one", 3..7)?, b"3456");
    assert_eq!(store.size("a/one")?, Some(10));
    assert_eq!(store.get("b/deep/three")?, b"");
    let names = |prefix: &str| -> occlude::error::Result<Vec<String>> {
        Ok(store.list(prefix)?.into_iter().map(|(name, _)| name).collect())
    };
    assert_eq!(names("")?, ["a/one", "a/two words", "b/deep/three"]);
    assert_eq!(names("a")?, ["a/one", "a/two words"]);
    assert_eq!(store.list_folders("")?, ["a", "b"]);
    assert!(store.create("lock", b"mine")?, "the first creates it");
    assert!(!store.create("lock", b"theirs")?, "the second does not");
    assert_eq!(store.get("lock")?, b"mine");
    // Larger than one request: uploaded and fetched in parts.
    let large: Vec<u8> = (0..70_000_000u32).map(|at| ((at * 31) >> 7) as u8).collect();
    store.put("large", &large)?;
    assert!(store.get("large")? == large, "a large object was changed");
    let inside = Store::open(&store.subfolder("b").url())?;
    assert_eq!(inside.get("deep/three")?, b"", "its URL opens it again");
    store.delete("large")?;
    store.delete("large")?;
    store.delete_folder("a")?;
    assert_eq!(names("")?, ["b/deep/three", "lock"]);
    println!("kept");
    Ok(())
}

/// Runs a case in a process with only this environment and returns the exit code and everything it printed.
fn run(case: &str, url: &str, environment: &[(&str, String)]) -> Result<(Option<i32>, String), Failed> {
    let mut command = Command::new(std::env::current_exe()?);
    let home = tempfile::tempdir()?;
    command.env_clear().env("OCCLUDE_CASE", case).env("OCCLUDE_URL", url).env("HOME", home.path());
    command.envs(std::env::vars().filter(|(name, _)| name.starts_with("LD_") || name == "PATH"));
    let output = command.envs(environment.iter().map(|(name, value)| (*name, value))).output()?;
    let text = [&output.stdout[..], &output.stderr].concat();
    Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
}

fn kept(url: &str, environment: &[(&str, String)]) -> Outcome {
    let (code, text) = run("cloud-promises", url, environment)?;
    assert!(code == Some(0) && text.contains("kept"), "{url}: {code:?} {text}");
    Ok(())
}

fn s3_fulfills_the_store_contract() -> Outcome {
    let server = Server::start();
    server.admit("somebody");
    // Every eleventh response is a failure, as on a busy day.
    server.faults(|errors| errors.fail_every = 11);
    kept("s3://bucket/run/one", &server.s3_environment("somebody"))?;
    assert!(server.keys().contains(&"bucket/run/one/lock".to_owned()), "{:?}", server.keys());
    Ok(())
}

/// A server of another project on a free port, killed at the end of the test.
struct ExternalServer(Child);

impl Drop for ExternalServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl ExternalServer {
    fn start(command: &mut Command, port: u16) -> Result<ExternalServer, Failed> {
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let server = ExternalServer(child);
        let started = Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            if started.elapsed() > Duration::from_secs(60) {
                return Err("the server does not come up".into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }
}

fn free_port() -> Result<u16, Failed> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn moto_s3_fulfills_the_store_contract() -> Outcome {
    let port = free_port()?;
    let python = root().join(".deps/venv/bin/python");
    let mut command = Command::new(&python);
    command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]);
    let _moto = ExternalServer::start(&mut command, port)?;
    let endpoint = format!("http://127.0.0.1:{port}");
    let options = "import boto3,sys; boto3.client('s3',endpoint_url=sys.argv[1],region_name='us-east-1',\
                aws_access_key_id='a',aws_secret_access_key='b').create_bucket(Bucket='bucket')";
    assert!(Command::new(&python).args(["-c", options, &endpoint]).status()?.success(), "no bucket");
    let environment = [
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_ACCESS_KEY_ID", "a".into()),
        ("AWS_SECRET_ACCESS_KEY", "b".into()),
        ("AWS_REGION", "us-east-1".into()),
    ];
    kept("s3://bucket/run", &environment)
}

/// The account that every azurite has, from its documentation.
const AZURITE: [&str; 2] =
    ["devstoreaccount1", "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="];

fn azure_fulfills_the_store_contract() -> Outcome {
    let port = free_port()?;
    let program = root().join(".deps/azurite/node_modules/.bin/azurite-blob");
    let folder = tempfile::tempdir()?;
    let mut command = Command::new(program);
    command.args(["--inMemoryPersistence", "--skipApiVersionCheck", "--silent", "--blobPort", &port.to_string()]);
    let _azurite = ExternalServer::start(command.current_dir(folder.path()), port)?;
    let environment = [
        ("AZURE_STORAGE_USE_EMULATOR", "true".to_owned()),
        ("AZURITE_BLOB_STORAGE_URL", format!("http://127.0.0.1:{port}")),
        ("AZURE_STORAGE_ACCOUNT_NAME", AZURITE[0].to_owned()),
        ("AZURE_STORAGE_ACCOUNT_KEY", AZURITE[1].to_owned()),
    ];
    let script = root().join("tests/oracle/container.py");
    let python = root().join(".deps/venv/bin/python");
    let arguments = [&format!("http://127.0.0.1:{port}"), AZURITE[0], AZURITE[1], "box"];
    assert!(Command::new(python).arg(script).args(arguments).status()?.success(), "no container");
    kept("az://box/run", &environment)
}

fn google_storage_fulfills_the_store_contract() -> Outcome {
    let server = Server::start();
    let folder = tempfile::tempdir()?;
    let account = folder.path().join("account.json");
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    let text = format!(
        r#"{{"gcs_base_url": "{endpoint}", "disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}}"#
    );
    std::fs::write(&account, text)?;
    kept("gs://bucket/run", &[("GOOGLE_SERVICE_ACCOUNT", account.display().to_string())])
}

fn credentials_can_come_from_a_profile() -> Outcome {
    let server = Server::start();
    server.admit("from-a-profile");
    let folder = tempfile::tempdir()?;
    let credentials = folder.path().join("credentials");
    let endpoint = format!("http://127.0.0.1:{}", server.port);
    std::fs::write(
        &credentials,
        "[default]\naws_access_key_id = other\naws_secret_access_key = x\n\n# a colleague's\n[lab]\n\
         aws_access_key_id=from-a-profile\naws_secret_access_key = canary-secret\n",
    )?;
    let config = folder.path().join("config");
    std::fs::write(&config, format!("[profile lab]\nregion = eu-central-1\nendpoint_url = {endpoint}\n"))?;
    let mut environment = vec![
        ("AWS_SHARED_CREDENTIALS_FILE", credentials.display().to_string()),
        ("AWS_CONFIG_FILE", config.display().to_string()),
        ("AWS_PROFILE", "lab".to_owned()),
    ];
    let (code, text) = run("cloud-list", "s3://bucket/run", &environment)?;
    assert_eq!(code, Some(0), "{text}");
    environment[2].1 = "nobody".into();
    let (code, text) = run("cloud-list", "s3://bucket/run", &environment)?;
    assert_eq!(code, Some(ExitCode::Usage as i32), "{text}");
    assert!(text.contains("AWS_PROFILE is nobody"), "{text}");
    Ok(())
}

fn rejected_credentials_are_reported_at_once() -> Outcome {
    let server = Server::start();
    server.admit("somebody");
    let started = Instant::now();
    let (code, text) = run("cloud-list", "s3://bucket/run", &server.s3_environment("somebody-else"))?;
    assert_eq!(code, Some(ExitCode::Credentials as i32), "{text}");
    assert!(text.contains("s3://bucket/run") && text.contains("InvalidAccessKeyId"), "{text}");
    assert!(started.elapsed() < Duration::from_secs(5), "took {:?}", started.elapsed());
    Ok(())
}

fn missing_credentials_are_reported_at_once() -> Outcome {
    for (url, remedy) in [
        ("s3://bucket/run", "AWS_ACCESS_KEY_ID"),
        ("gs://bucket/run", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://box/run", "AZURE_STORAGE_ACCOUNT_NAME"),
    ] {
        let started = Instant::now();
        let account = [("AZURE_STORAGE_ACCOUNT_NAME", "somebody".to_owned())];
        let (code, text) = run("cloud-list", url, &account)?;
        assert_eq!(code, Some(ExitCode::Credentials as i32), "{url}: {text}");
        assert!(text.contains(url) && text.contains(remedy), "{url}: {text}");
        assert!(started.elapsed() < Duration::from_secs(6), "{url} took {:?}", started.elapsed());
    }
    Ok(())
}

fn secrets_are_never_printed() -> Outcome {
    let server = Server::start();
    server.admit("somebody");
    let mut environment = server.s3_environment("somebody-else");
    environment.push(("AWS_SESSION_TOKEN", "canary-token".into()));
    let refused = run("cloud-list", "s3://bucket/run", &environment)?.1;
    server.faults(|errors| errors.away_until = Some(Instant::now() + Duration::from_secs(3600)));
    let away = run("cloud-list", "s3://bucket/run", &environment)?.1;
    let query = run("cloud-list", &format!("http://me:canary-pass@127.0.0.1:{}/x?sig=canary", server.port), &[])?.1;
    for text in [refused, away, query] {
        assert!(!text.is_empty() && !text.contains("canary"), "{text}");
    }
    Ok(())
}

fn an_unknown_scheme_is_named() -> Outcome {
    let (code, text) = run("cloud-list", "hdfs://me:secret@host/x?token=secret", &[])?;
    assert_eq!(code, Some(ExitCode::Usage as i32), "{text}");
    assert!(text.contains("hdfs://host/x") && text.contains("s3://") && !text.contains("secret"), "{text}");
    Ok(())
}
