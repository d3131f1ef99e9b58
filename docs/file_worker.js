// Browsers start no worker for a page that was opened from a folder. The search runs in
// one, so there it gets a hidden frame instead.
if (location.protocol === 'file:') {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement('iframe');
      frame.hidden = true;
      document.documentElement.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => {
        const event = new MessageEvent('message', { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      const script = inside.document.createElement('script');
      script.src = new URL(url, location.href).href;
      this.inside = new Promise((resolve) => {
        script.onload = () => resolve(inside);
      });
      inside.document.head.append(script);
      this.frame = frame;
    }

    postMessage(data) {
      this.inside.then((inside) => {
        inside.dispatchEvent(new inside.MessageEvent('message', { data }));
      });
    }

    terminate() {
      this.frame.remove();
    }
  };
}
