//! What a PyTorch checkpoint's pickle may build: ordered dictionaries, views of storages, a bag of arguments. Everything
//! else that a pickle can name is refused by that name, before it means anything.

use super::pickle::{Id, Node};
use tch::Kind;

/// A name that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Global {
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`.
    Tensor,
    /// `torch._utils._rebuild_parameter`.
    Parameter,
    /// The class of a storage: what its elements are.
    Storage(Kind),
    /// Arguments and paths that trainings save beside the weights; kept as inert bags.
    Inert,
}

/// A run of elements in the archive.
#[derive(Clone, Debug)]
pub struct Storage {
    pub kind: Kind,
    /// Its member is `data/<key>`.
    pub key: String,
    pub count: i64,
}

/// A tensor: a view of a storage that lies wholly inside it and has no more elements than it.
#[derive(Clone, Debug)]
pub struct View {
    pub storage: Storage,
    pub offset: i64,
    pub size: Vec<i64>,
    pub stride: Vec<i64>,
}

/// What a name stands for.
pub fn global(module: &str, name: &str) -> Result<Global, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => Global::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => Global::Tensor,
        ("torch._utils", "_rebuild_parameter") => Global::Parameter,
        ("argparse", "Namespace") | ("pathlib", "PosixPath" | "WindowsPath") => Global::Inert,
        ("torch", "FloatStorage") => Global::Storage(Kind::Float),
        ("torch", "HalfStorage") => Global::Storage(Kind::Half),
        ("torch", "BFloat16Storage") => Global::Storage(Kind::BFloat16),
        ("torch", "DoubleStorage") => Global::Storage(Kind::Double),
        ("torch", "LongStorage") => Global::Storage(Kind::Int64),
        ("torch", "IntStorage") => Global::Storage(Kind::Int),
        ("torch", "ShortStorage") => Global::Storage(Kind::Int16),
        ("torch", "CharStorage") => Global::Storage(Kind::Int8),
        ("torch", "ByteStorage") => Global::Storage(Kind::Uint8),
        ("torch", "BoolStorage") => Global::Storage(Kind::Bool),
        _ => {
            let shown: String = format!("{module}.{name}").chars().take(80).collect();
            return Err(format!("it asks for {shown:?}, which no state dict needs; nothing of it was executed"));
        }
    })
}

/// What calling one of the names makes.
pub fn make(nodes: &[Node], callable: Id, arguments: Id) -> Result<Node, String> {
    let Node::Tuple(arguments) = &nodes[arguments] else { return Err("it calls something without arguments".into()) };
    match (&nodes[callable], &arguments[..]) {
        (Node::Global(Global::OrderedDict), []) => Ok(Node::Dict(Vec::new())),
        (Node::Global(Global::OrderedDict), [items]) => ordered(nodes, *items),
        (Node::Global(Global::Tensor), [storage, offset, size, stride, ..]) => {
            view(nodes, *storage, *offset, *size, *stride).map(Node::Tensor)
        }
        (Node::Global(Global::Parameter), [tensor, ..]) => match &nodes[*tensor] {
            Node::Tensor(view) => Ok(Node::Tensor(view.clone())),
            _ => Err("a parameter in it is no tensor".into()),
        },
        (Node::Global(Global::Inert), _) => Ok(Node::Bag(None)),
        _ => Err("it calls what cannot be called, or with too few arguments".into()),
    }
}

/// An ordered dictionary from a list of pairs.
fn ordered(nodes: &[Node], items: Id) -> Result<Node, String> {
    let Node::List(items) = &nodes[items] else { return Err("an ordered dictionary in it is of no list".into()) };
    let pair = |item: &Id| match &nodes[*item] {
        Node::Tuple(pair) | Node::List(pair) if pair.len() == 2 => Ok((pair[0], pair[1])),
        _ => Err("an ordered dictionary in it is of no pairs".to_owned()),
    };
    Ok(Node::Dict(items.iter().map(pair).collect::<Result<_, _>>()?))
}

/// A storage from its persistent id: ("storage", class, key, device, elements).
pub fn storage(nodes: &[Node], id: Id) -> Result<Node, String> {
    let Node::Tuple(parts) = &nodes[id] else { return Err("a storage in it has no name".into()) };
    let parts: Vec<&Node> = parts.iter().map(|&part| &nodes[part]).collect();
    match parts[..] {
        [Node::Text(word), Node::Global(Global::Storage(kind)), Node::Text(key), Node::Text(_), Node::Int(count)]
            if word == "storage" && *count >= 0 =>
        {
            Ok(Node::Storage(Storage { kind: *kind, key: key.clone(), count: *count }))
        }
        _ => Err("a storage in it is described in an unknown way".into()),
    }
}

fn view(nodes: &[Node], storage: Id, offset: Id, size: Id, stride: Id) -> Result<View, String> {
    let (Node::Storage(storage), Node::Int(offset)) = (&nodes[storage], &nodes[offset]) else {
        return Err("a tensor in it has no storage".into());
    };
    let (size, stride) = (numbers(nodes, size)?, numbers(nodes, stride)?);
    let outside = || "a tensor in it reaches beyond its storage".to_owned();
    if size.len() != stride.len() || size.len() > 8 || size.iter().chain(&stride).any(|&n| n < 0) || *offset < 0 {
        return Err("a tensor in it has an impossible shape".into());
    }
    let elements = size.iter().try_fold(1i64, |product, &n| product.checked_mul(n)).ok_or_else(outside)?;
    let reach =
        size.iter().zip(&stride).try_fold(*offset, |at, (&n, &step)| at.checked_add((n - 1).max(0).checked_mul(step)?));
    let last = reach.ok_or_else(outside)?;
    // A stride of 0 could make one element a terabyte.
    if elements > storage.count || *offset > storage.count || (elements > 0 && last >= storage.count) {
        return Err(outside());
    }
    Ok(View { storage: storage.clone(), offset: *offset, size, stride })
}

fn numbers(nodes: &[Node], id: Id) -> Result<Vec<i64>, String> {
    let Node::Tuple(items) = &nodes[id] else { return Err("a tensor in it has no shape".into()) };
    let number = |&item: &Id| match nodes[item] {
        Node::Int(n) => Ok(n),
        _ => Err("a tensor in it has a shape that is no number".to_owned()),
    };
    items.iter().map(number).collect()
}

/// Gives an object its attributes: a bag keeps them, a dictionary's (`_metadata` of a state dict) are of no use.
pub fn build(nodes: &mut [Node], made: Id, state: Id) -> Result<(), String> {
    match &mut nodes[made] {
        Node::Bag(attributes) => *attributes = Some(state),
        Node::Dict(_) => {}
        _ => return Err("it gives attributes to what has none".into()),
    }
    Ok(())
}
