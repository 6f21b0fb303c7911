//! The OpenAI dialect, one module for each family of operations; `request` and `response` are chat's.

pub mod completions;
pub mod embeddings;
pub mod error;
pub mod fields;
pub mod files;
pub mod form;
pub mod images;
pub mod moderations;
pub mod page;
pub mod prompts;
pub mod request;
pub mod response;
pub mod responses;
pub mod sound;
pub mod speech;
pub mod stored_chats;
pub mod transcriptions;

use crate::api::Served;
use crate::call::Call;
use crate::endpoint::Endpoint;
use crate::provider::ApiError;

/// Everything but chat and the list of models.
pub fn serve(call: &mut Call) -> Result<Served, ApiError> {
    match call.endpoint {
        Endpoint::ChatList => stored_chats::list(call),
        Endpoint::ChatStored => stored_chats::read(call),
        Endpoint::ChatMessages => stored_chats::messages(call),
        Endpoint::ChatUpdate => stored_chats::update(call),
        Endpoint::ChatDelete => stored_chats::delete(call),
        Endpoint::Responses => responses::create(call),
        Endpoint::ResponseStored => responses::stored::read(call),
        Endpoint::ResponseDelete => responses::stored::delete(call),
        Endpoint::ResponseCancel => responses::stored::cancel(call),
        Endpoint::ResponseInput => responses::stored::input_items(call),
        Endpoint::Embeddings => embeddings::create(call),
        Endpoint::Completions => completions::create(call),
        Endpoint::Moderations => moderations::create(call),
        Endpoint::Images => images::create(call),
        Endpoint::Speech => speech::create(call),
        Endpoint::Transcriptions => transcriptions::create(call),
        Endpoint::FileUpload => files::upload(call),
        Endpoint::FileList => files::list(call),
        Endpoint::File => files::read(call),
        Endpoint::FileDelete => files::delete(call),
        Endpoint::FileContent => files::content(call),
        _ => Err(error::unknown_url(call.parts.method.as_str(), call.parts.uri.path())),
    }
}
