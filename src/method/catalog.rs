//! The only list of methods: one line each.

use super::{
    Method, MethodConfig, Requirements, audiomae, contrastive_mae, flip, igpt, mae, maskfeat, mfm, omnimae, rmae,
    supmae, videomae,
};
use crate::error::Result;
use crate::grid::{Grid, InputConfig};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Declares the config's `method`, `{"<name>": {..}}`, from lines of variant, module and name.
macro_rules! catalog {
    ($($variant:ident = $module:ident, $name:literal;)*) => {
        /// The config's `method`: its name and its values, `{"mae": {..}}`.
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        pub enum Config {
            $(#[serde(rename = $name)] $variant($module::Config),)*
        }

        impl Config {
            /// Names of all methods.
            pub const NAMES: &[&str] = &[$(<$module::Config as MethodConfig>::NAME),*];

            fn inner(&self) -> &dyn AnyConfig {
                match self {
                    $(Config::$variant(config) => config,)*
                }
            }
        }

        $(const _: () = assert!(equal(<$module::Config as MethodConfig>::NAME, $name));)*
    };
}

catalog! {
    Mae = mae, "mae";
    VideoMae = videomae, "videomae";
    OmniMae = omnimae, "omnimae";
    AudioMae = audiomae, "audiomae";
    Flip = flip, "flip";
    SupMae = supmae, "supmae";
    MaskFeat = maskfeat, "maskfeat";
    Mfm = mfm, "mfm";
    RMae = rmae, "rmae";
    Igpt = igpt, "igpt";
    ContrastiveMae = contrastive_mae, "contrastive_mae";
}

impl Config {
    /// Returns the method's name, its key in the config.
    pub fn name(&self) -> &'static str {
        self.inner().name()
    }

    /// Checks the method's values.
    ///
    /// # Errors
    /// ExitCode::Usage on a value that cannot work, before any work begins.
    pub fn check(&self, grid: &Grid) -> Result<()> {
        self.inner().check(&format!("method.{}", self.name()), grid)
    }

    /// Returns what the method needs of a run.
    pub fn requirements(&self) -> Requirements<'_> {
        self.inner().requirements()
    }

    /// Builds the method.
    ///
    /// # Errors
    /// ExitCode::Usage if its values do not fit the input.
    pub fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        self.inner().build(input)
    }
}

/// [`MethodConfig`] without its constant, as a trait object.
trait AnyConfig {
    fn name(&self) -> &'static str;
    fn check(&self, at: &str, grid: &Grid) -> Result<()>;
    fn requirements(&self) -> Requirements<'_>;
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>>;
}

impl<C: MethodConfig> AnyConfig for C {
    fn name(&self) -> &'static str {
        C::NAME
    }
    fn check(&self, at: &str, grid: &Grid) -> Result<()> {
        MethodConfig::check(self, at, grid)
    }
    fn requirements(&self) -> Requirements<'_> {
        MethodConfig::requirements(self)
    }
    fn build(&self, input: &InputConfig) -> Result<Box<dyn Method>> {
        MethodConfig::build(self, input)
    }
}

/// Compares two names at compile time.
const fn equal(a: &str, b: &str) -> bool {
    let a = a.as_bytes();
    let b = b.as_bytes();
    let mut index = 0;
    while index < a.len() && index < b.len() && a[index] == b[index] {
        index += 1;
    }
    index == a.len() && index == b.len()
}
