/* A browser starts no worker for a page that is opened from disk. There the script of a worker runs in a hidden frame,
   so that the search of the site works. The theme's search looks for the name `IFrameWorker`. */
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.answer = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.frame.srcdoc =
        "<script>postMessage = (data) => frameElement.answer(data)</script>" +
        `<script src="${new URL(url, location)}"></script>`
      this.started = new Promise((resolve) => (this.frame.onload = resolve))
      document.documentElement.append(this.frame)
    }

    postMessage(data) {
      this.started.then(() => {
        const inside = this.frame.contentWindow
        inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      })
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
