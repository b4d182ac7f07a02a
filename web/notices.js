// What the pack has to say of a node, on the node: it stays until the node runs again or says something else.

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

const EVENT = "nested_attention.notice"

/** The node of an id in the running graph: "4:7" is node 7 of the subgraph that node 4 stands for. */
function nodeOf(id) {
    let node = { subgraph: app.rootGraph ?? app.graph }
    for (const part of String(id).split(":")) node = node?.subgraph?.getNodeById(Number(part))
    return node
}

const noticeOf = (node) => node?.widgets?.find((widget) => widget.name === EVENT)

function show({ node_id, text }) {
    const node = nodeOf(node_id)
    if (!node) return
    const element = noticeOf(node)?.element ?? document.createElement("div")
    element.textContent = text
    if (noticeOf(node)) return
    element.style.cssText =
        "white-space: pre-wrap; overflow-y: auto; box-sizing: border-box; padding: 4px 8px; font-size: 12px;" +
        "line-height: 1.4; user-select: text; color: var(--input-text); background: var(--comfy-input-bg)"
    const widget = node.addDOMWidget(EVENT, EVENT, element, { serialize: false, getMinHeight: () => 64 })
    widget.serialize = false // its value is no input: it must not count among the saved ones
    node.setDirtyCanvas(true, true)
}

app.registerExtension({
    name: "nested_attention.notices",
    setup() {
        api.addEventListener(EVENT, ({ detail }) => show(detail))
        api.addEventListener("executing", ({ detail }) => {
            const node = detail && nodeOf(detail)
            if (noticeOf(node)) node.removeWidget(noticeOf(node))
        })
    },
})
