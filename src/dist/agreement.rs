//! Agreement of all ranks before the first step: a job whose ranks have different configs, builds or data sets is
//! refused before any work is lost.

use super::world::World;
use crate::bridge::bytes;
use crate::error::{Error, ExitCode, Result};
use std::time::Duration;
use tch::Tensor;

/// Maximum time for all ranks to arrive; one may still be reading its data.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Compares labeled values (digests, versions, seeds) over ranks; collective.
///
/// # Errors
/// [`ExitCode::RankMismatch`] on every rank if values differ; the message lists each such label with its values and
/// their ranks.
pub fn check_agreement(world: &dyn World, values: &[(&str, String)]) -> Result<()> {
    let mut channel = world.open_channel("agree")?;
    let mut text = serde_json::to_vec(values).expect("pairs of strings");
    let length = Tensor::from_slice(&[text.len() as i64]);
    let lengths = Vec::<i64>::try_from(channel.all_gather(&length).wait(TIMEOUT)?.reshape([-1]))?;
    let width = lengths.iter().copied().max().unwrap_or(0) as usize;
    text.resize(width, b' ');
    let gathered = channel.all_gather(&Tensor::from_slice(&text)).wait(TIMEOUT)?;
    let parse = |bytes: &[u8]| serde_json::from_slice::<Vec<(String, String)>>(bytes);
    let ranks = bytes(&gathered).chunks(width.max(1)).map(parse).collect::<Result<Vec<_>, _>>();
    let ranks = ranks.map_err(|error| Error::failed(format!("agreement: another rank sent invalid JSON: {error}.")))?;
    let differences = differences(&ranks);
    if differences.is_empty() {
        return Ok(());
    }
    let message = format!(
        "Ranks disagree, so nothing was started:\n{}\nStart every rank with the same program, config and data.",
        differences.join("\n")
    );
    Err(Error::new(ExitCode::RankMismatch, message))
}

/// Returns one line for each label whose values differ, such as `  config: a1 on ranks 0, 2; b7 on rank 1`.
fn differences(ranks: &[Vec<(String, String)>]) -> Vec<String> {
    let mut labels: Vec<&str> = Vec::new();
    for (label, _) in ranks.iter().flatten() {
        if !labels.contains(&label.as_str()) {
            labels.push(label);
        }
    }
    labels.into_iter().filter_map(|label| difference(label, ranks)).collect()
}

fn difference(label: &str, ranks: &[Vec<(String, String)>]) -> Option<String> {
    let mut groups: Vec<(&str, Vec<usize>)> = Vec::new();
    for (rank, pairs) in ranks.iter().enumerate() {
        let value = pairs.iter().find(|(name, _)| name == label).map_or("nothing", |(_, value)| value);
        match groups.iter_mut().find(|(other, _)| *other == value) {
            Some((_, members)) => members.push(rank),
            None => groups.push((value, vec![rank])),
        }
    }
    if groups.len() < 2 {
        return None;
    }
    let groups: Vec<String> = groups.iter().map(|(value, members)| describe_group(value, members)).collect();
    Some(format!("  {label}: {}", groups.join("; ")))
}

/// Describes which ranks have a value. A thousand ranks would fill the screen; the first few suffice to find the host.
fn describe_group(value: &str, ranks: &[usize]) -> String {
    const MAX_SHOWN: usize = 8;
    let plural = if ranks.len() > 1 { "s" } else { "" };
    let shown: Vec<String> = ranks.iter().take(MAX_SHOWN).map(usize::to_string).collect();
    let more = if ranks.len() > MAX_SHOWN { format!(" and {} more", ranks.len() - MAX_SHOWN) } else { String::new() };
    format!("{value} on rank{plural} {}{more}", shown.join(", "))
}
