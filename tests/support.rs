//! What the test modules share: how a trial is made, where other people's code is asked, how a failure reads.

use libtest_mimic::{Failed, Trial};
use std::path::{Path, PathBuf};

pub type Outcome = Result<(), Failed>;

/// `trials![f, g]`: the functions of a module as trials named `module::f`.
#[macro_export]
macro_rules! trials {
    ($($case:ident),* $(,)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            let module = module_path!().rsplit("::").next().expect("a module");
            vec![$($crate::support::trial(&format!("{module}::{}", stringify!($case)), $case)),*]
        }
    };
}

/// A trial whose panic or fault is its failure.
pub fn trial(name: &str, case: fn() -> Outcome) -> Trial {
    Trial::test(name, case)
}

/// A trial that cannot run here and says why.
#[allow(dead_code)]
pub fn skipped(name: &str, why: &str) -> Trial {
    Trial::test(format!("{name} [skipped: {why}]"), || Ok(())).with_ignored_flag(true)
}

/// The repository's root.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Runs `tests/oracle/<script>` with the arguments in the pinned Python and returns its standard output.
#[allow(dead_code)]
pub fn oracle(script: &str, arguments: &[&str]) -> Result<String, Failed> {
    let python = root().join(".deps/venv/bin/python");
    if !Path::new(&python).exists() {
        return Err("no .deps/venv/bin/python: run launch/setup --oracles".into());
    }
    let output = std::process::Command::new(python)
        .arg(root().join("tests/oracle").join(script))
        .args(arguments)
        .env("TOKENIZERS_PARALLELISM", "false")
        .output()?;
    if !output.status.success() {
        return Err(format!("{script} failed:\n{}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Tensors by name, as a safetensors file holds them.
pub type Tensors = std::collections::BTreeMap<String, tch::Tensor>;

#[allow(dead_code)]
pub fn read(path: &Path) -> Result<Tensors, Failed> {
    Ok(tch::Tensor::read_safetensors(path)?.into_iter().collect())
}

#[allow(dead_code)]
pub fn write(path: &Path, tensors: &[(String, tch::Tensor)]) -> Result<(), Failed> {
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.contiguous())).collect();
    Ok(tch::Tensor::write_safetensors(&tensors, path)?)
}

/// ‖a − b‖.
#[allow(dead_code)]
pub fn distance(a: &tch::Tensor, b: &tch::Tensor) -> f64 {
    (a - b).norm().double_value(&[])
}

/// Standard normal values, the same for the same seed whatever else runs.
#[allow(dead_code)]
pub fn normal(seed: u64, shape: &[i64]) -> tch::Tensor {
    let mut draw = occlude::rng::Draw::new(seed, 77, 0, occlude::rng::Purpose::Init, 0);
    let values: Vec<f32> = (0..shape.iter().product::<i64>()).map(|_| draw.normal() as f32).collect();
    tch::Tensor::from_slice(&values).view(shape)
}
