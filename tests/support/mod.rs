//! The test harness and what test modules share: trials, oracles, tensors.

pub mod allocations;
pub mod child_process;
pub mod method_ext;
pub mod object_store;
pub mod parity;
pub mod tolerance;
pub mod training_job;
pub mod vit_mae;

use libtest_mimic::{Failed, Trial};
use occlude::error::ExitCode;
use std::path::{Path, PathBuf};

pub type Outcome = Result<(), Failed>;

/// Asserts that each line, set on a tiny config, is refused with these words.
pub fn assert_lines_rejected(tiny: &str, lines: &[(&str, &str)]) -> Outcome {
    let path = root().join(format!("configs/tiny/{tiny}.json"));
    for (line, words) in lines {
        let error = occlude::config::Config::read(&path, &[(*line).to_owned()]).expect_err(line);
        assert!(error.code == ExitCode::Usage && error.message.contains(words), "{line}: {error}");
    }
    Ok(())
}

/// A test as a function.
pub type Case = fn() -> Outcome;

/// `modules![a, b]` declares the modules of a folder and collects their trials, so that a file is named once.
#[macro_export]
macro_rules! modules {
    ($($module:ident),* $(,)?) => {
        $(pub mod $module;)*

        pub fn trials() -> Vec<libtest_mimic::Trial> {
            let mut trials = Vec::new();
            $(trials.extend($module::trials());)*
            trials
        }
    };
}

/// `trials![f, g]` makes trials of a module's functions, named `folder::module::f`. The functions of
/// `trials![f; reason: g]` after the semicolon are skipped where `reason()` returns why they cannot run.
#[macro_export]
macro_rules! trials {
    ($($case:ident),* $(,)? $(; $reason:ident: $($conditional:ident),* $(,)?)?) => {
        pub fn trials() -> Vec<libtest_mimic::Trial> {
            let always: &[(&str, $crate::support::Case)] = &[$((stringify!($case), $case)),*];
            let (reason, conditional): (Option<&str>, &[(&str, $crate::support::Case)]) =
                $crate::trials!(@conditional $($reason: $($conditional),*)?);
            $crate::support::trials(module_path!(), always, reason, conditional)
        }
    };
    (@conditional) => {
        (None, &[])
    };
    (@conditional $reason:ident: $($conditional:ident),*) => {
        ($reason(), &[$((stringify!($conditional), $conditional)),*])
    };
}

/// Trials of the cases of a module; with a `reason`, the conditional ones are skipped.
pub fn trials(module: &str, always: &[(&str, Case)], reason: Option<&str>, conditional: &[(&str, Case)]) -> Vec<Trial> {
    let always = always.iter().map(|(name, case)| Trial::test(trial_name(module, name), *case));
    let conditional = conditional.iter().map(|(name, case)| {
        let name = trial_name(module, name);
        match reason {
            None => Trial::test(name, *case),
            Some(reason) => skipped(&name, reason),
        }
    });
    always.chain(conditional).collect()
}

/// Returns the name of a trial: the path of the module in this binary, and the name of the function.
pub fn trial_name(module: &str, case: &str) -> String {
    let path = module.split_once("::").map_or("", |(_, path)| path);
    format!("{path}::{case}")
}

/// Returns a trial that cannot run here, with the reason in its name.
pub fn skipped(name: &str, why: &str) -> Trial {
    Trial::test(format!("{name} [skipped: {why}]"), || Ok(())).with_ignored_flag(true)
}

/// Returns why tests that need a CUDA device are skipped, if they are.
pub fn no_cuda_device() -> Option<&'static str> {
    (!tch::Cuda::is_available()).then_some("no CUDA device here")
}

/// Returns the root of the repository.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a path as a string.
pub fn path_text(path: impl AsRef<Path>) -> String {
    path.as_ref().to_str().expect("UTF-8").to_owned()
}

/// Runs `tests/oracle/<script>` with the arguments in the pinned Python and returns its standard output.
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

/// Tensors by name, as in a safetensors file.
pub type Tensors = std::collections::BTreeMap<String, tch::Tensor>;

pub fn read(path: &Path) -> Result<Tensors, Failed> {
    Ok(tch::Tensor::read_safetensors(path)?.into_iter().collect())
}

pub fn write(path: &Path, tensors: &[(String, tch::Tensor)]) -> Result<(), Failed> {
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.contiguous())).collect();
    Ok(tch::Tensor::write_safetensors(&tensors, path)?)
}

/// Returns ‖a − b‖.
pub fn distance(a: &tch::Tensor, b: &tch::Tensor) -> f64 {
    (a - b).norm().double_value(&[])
}

/// Returns standard normal values that depend only on the seed.
pub fn normal(seed: u64, shape: &[i64]) -> tch::Tensor {
    let mut draw = occlude::rng::Philox::new(seed, 77, 0, occlude::rng::Purpose::Init, 0);
    let values: Vec<f32> = (0..shape.iter().product::<i64>()).map(|_| draw.normal() as f32).collect();
    tch::Tensor::from_slice(&values).view(shape)
}
